from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from fastbert.errors import InputError
from fastbert.tasks.columns import Columns
from fastbert.tasks.table import Row, read_same_columns, read_table


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "A.TSV"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_tsv_with_every_kind_of_line_end(tmp_path, name, mark, end) -> None:
    lines = ["label\ttext", '1\t"bare quotes', "0\tcafé, \u2028 'x'\"", "1\t", ""]
    path = write(tmp_path / name, mark + end.join(line.encode() for line in lines))
    table = read_table(path)
    assert table.columns == Columns("text", "label")
    assert table.rows == [
        Row('"bare quotes', "1", None, 2),
        Row("café, \u2028 'x'\"", "0", None, 3),
        Row("", "1", None, 4),
    ]
    assert table.empty_texts == 1


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_quotes_span_commas_lines_and_quotes(tmp_path, name) -> None:
    texts = ['one, "two"', "line\nbreak", "", "plain"]
    path = tmp_path / "raw.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], *([text, "x"] for text in texts)])
    table = read_table(write(tmp_path / name, path.read_bytes()))
    assert [row.text for row in table.rows] == texts
    # the line on which each record starts
    assert [row.line for row in table.rows] == [2, 3, 5, 6]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_labels_of_every_type(tmp_path, name) -> None:
    records = [
        {"text": "a", "label": 3, "more": [1]},
        {"label": True, "text": "b"},
        {"text": None, "label": " c "},
    ]
    text = "\n".join(map(json.dumps, records)) + "\n\n"
    table = read_table(write(tmp_path / name, text))
    assert [(row.text, row.label, row.line) for row in table.rows] == [
        ("a", "3", 1),
        ("b", "true", 2),
        ("", "c", 3),
    ]


def test_what_was_guessed_is_said(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n\t\t0\n")
    assert read_table(path).describe() == (
        f"{path}: 2 rows, text column 'sentence1', second text column 'sentence2', "
        "label column 'label' (guessed; --text-column, --pair-column, --label-column to change); "
        "1 row without text, kept"
    )
    named = read_table(path, text_column="sentence2", label_column="label")
    assert named.describe() == (
        f"{path}: 2 rows, text column 'sentence2', label column 'label'; 1 row without text, kept"
    )


def test_another_file_is_read_by_the_same_columns(tmp_path) -> None:
    first = read_table(write(tmp_path / "a.tsv", "text\tlabel\na\t1\n"))
    # by itself this header would be read as a pair
    second = write(tmp_path / "b.csv", "text_a,text_b,label,text\np,q,1,r\n")
    assert read_same_columns(second, first).rows == [Row("r", "1", None, 2)]
    third = write(tmp_path / "c.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(InputError, match=r"c.tsv: no column 'text' .* 'sentence', 'label'"):
        read_same_columns(third, first)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", r"a.tsv: the file is empty"),
        ("a.csv", "\n\n", r"a.csv: the file is empty"),
        ("a.jsonl", "", r"a.jsonl: no rows"),
        ("a.tsv", "text\tlabel\n", r"a.tsv: no rows"),
        ("a.tsv", "text\nabc\n", r"a.tsv:1: the header names one column, 'text'.* tabs"),
        ("a.csv", "text;label\na;b\n", r"a.csv:1: the header names one column.* commas"),
        ("a.tsv", "text\ttext\tlabel\na\tb\t1\n", r"a.tsv:1: .* the column 'text' twice"),
        ("a.tsv", b"text\tlabel\nab\t1\n\xff\t1\n", r"a.tsv: byte 16: not UTF-8"),
        ("a.csv", b"text,label\nab,1\nc\xff,1\n", r"a.csv: byte 17: not UTF-8"),
        ("a.tsv", "text\tlabel\na\t1\nb\n", r"a.tsv:3: 1 field, the header has 2"),
        ("a.tsv", "text\tlabel\na\tb\t1\n", r"a.tsv:2: 3 fields, the header has 2"),
        ("a.csv", "text,label\na,1\nb,c,1\n", r"a.csv:3: 3 fields, the header has 2"),
        ("a.csv", 'text,label\na,1\n"b,1\n', r"a.csv:3: not valid csv"),
        ("a.tsv", "text\tlabel\na\t1\nb\t \n", r"a.tsv:3: the label \(column 'label'\) is empty"),
        ("a.jsonl", '{"text": "a", "label": null}', r"a.jsonl:1: the label .* is empty"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{', r"a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1]', r"a.jsonl:2: expected a JSON object"),
        ("a.jsonl", '{"text": "a"}', r"a.jsonl:1: 1 field; at least a text and a label"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "l": 1}', r"a.jsonl:2: no field 'la"),
        ("a.jsonl", '{"text": 5, "label": 1}', r"a.jsonl:1: field 'text' must be text, got 5"),
        ("a.jsonl", '{"text": "a", "label": [1]}', r"a.jsonl:1: field 'label' must be one label"),
        ("a.jsonl", "[" * 200_000, r"a.jsonl:1: not JSON that can be read"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"a.jsonl:1: not JSON that can be read"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', r"a.jsonl:1: field 'text' .* surrogate"),
        ("a.jsonl", '{"text": "a", "label": "\\udfff"}', r"a.jsonl:1: field 'label' .* surrogate"),
        ("a.txt", "text\tlabel\na\t1\n", r"a.txt: not a table by its name; .tsv, .csv and .jsonl"),
        ("a", "text\tlabel\na\t1\n", r"a: not a table by its name"),
        ("a.gz", "text\tlabel\na\t1\n", r"a.gz: not a table by its name"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, name, content, message) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none.tsv: no such file; .tsv, .csv and .jsonl"):
        read_table(tmp_path / "none.tsv")
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(InputError, match=r"folder.tsv: a folder; .tsv, .csv and .jsonl"):
        read_table(tmp_path / "folder.tsv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "\ntext\tlabel\n\na\t1\n\n"),
        ("a.csv", 'text,label\r\n\r\na,1\r\n\r\n\r\n"b\n\nc",2\r\n'),
        ("a.jsonl", '\n{"text": "a", "label": 1}\n \n\n'),
    ],
)
def test_blank_lines_are_skipped_and_counted(tmp_path, name, content) -> None:
    table = read_table(write(tmp_path / name, content))
    assert table.rows[0].text == "a"
    assert table.blank_lines == 3
    assert table.describe().endswith("; 3 blank lines skipped")


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--text-column", {"text_column": "x"}),
        ("--pair-column", {"pair_column": "x"}),
        ("--label-column", {"label_column": "x"}),
    ],
)
def test_a_column_that_is_not_there(tmp_path, flag, given) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\na\t1\n")
    expected = rf"a.tsv: no column 'x' \({flag}\); there are 'text', 'label'"
    with pytest.raises(InputError, match=expected):
        read_table(path, **given)


@pytest.mark.parametrize(
    ("name", "columns", "rows", "classes"),
    [
        ("classification/sst2/train.tsv", Columns("sentence", "label"), 67349, {"0", "1"}),
        ("classification/chnsenticorp/dev.tsv", Columns("text_a", "label"), 1200, {"0", "1"}),
        (
            "pairs/rte/dev.tsv",
            Columns("sentence1", "label", "sentence2"),
            277,
            {"entailment", "not_entailment"},
        ),
    ],
)
def test_public_data_sets(data, name, columns, rows, classes) -> None:
    if not (data / name).is_file():
        pytest.skip(f"no {data / name}")
    table = read_table(data / name)
    assert table.columns == columns
    assert len(table.rows) == rows
    assert {row.label for row in table.rows} == classes
    assert table.empty_texts == 0
