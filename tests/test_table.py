from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from fastbert.errors import InputError
from fastbert.tasks.columns import Columns
from fastbert.tasks.records import FileFormat, read_records
from fastbert.tasks.table import Row, read_table


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


def test_another_encoding_by_its_name(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\nNiño\t1\n".encode("iso-8859-1"))
    with pytest.raises(InputError, match=r"a.tsv: byte 13: not UTF-8.*; --encoding names another"):
        read_table(path)
    assert read_table(path, form=FileFormat("iso-8859-1")).rows[0].text == "Niño"
    with pytest.raises(InputError, match="knows no encoding 'latin-9000'"):
        FileFormat("latin-9000")
    with pytest.raises(InputError, match="--quoting must be one of auto, none, csv, got 'all'"):
        FileFormat(quoting="all")


def test_a_file_without_a_header(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "1\tone\n0\ttwo\tmore\tand more\n")
    records = read_records(path, FileFormat(columns=("label", "text")))
    assert [record.fields for record in records.rows] == [
        {"label": "1", "text": "one"},
        {"label": "0", "text": "two"},
    ]
    assert records.surplus == 1 and "1 row with more fields" in records.remarks()
    with pytest.raises(InputError, match=r"a.tsv:1: 2 fields, --columns names 3"):
        read_records(path, FileFormat(columns=("a", "b", "c")))


@pytest.mark.parametrize(
    ("rows", "quoted"),
    [
        # a writer that quotes everything, and one that quotes what needs it
        (['"text"\t"label"', '"a"\t"1"'], True),
        (["text\tlabel", '"say ""a"""\t1', "b\t0"], True),
        # quotes that belong to the text, as GLUE has them
        (["text\tlabel", '"a" he said\t1'], False),
        (["text\tlabel", '"a"\t1'], False),
        (["text\tlabel", '"a\t1'], False),
    ],
)
def test_quotes_around_fields_are_told_from_quotes_in_texts(tmp_path, rows, quoted) -> None:
    path = write(tmp_path / "a.tsv", "\n".join(rows))
    records = read_records(path)
    assert records.quoted == quoted
    assert ("guessed; --quoting none" in records.remarks()) == quoted
    bare = read_records(path, FileFormat(quoting="none"))
    assert next(iter(bare.rows[0].fields.values())) == rows[1].split("\t")[0]
    with_marks = [record.fields for record in records.rows]
    assert (with_marks == [record.fields for record in bare.rows]) == (not quoted)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "t", "label": ["b", "a", "b"]}\n{"text": "u", "label": []}'),
        ("a.tsv", "text\tlabel\nt\tb, a,b\nu\t"),
    ],
)
def test_any_number_of_labels_a_row(tmp_path, name, content) -> None:
    rows = read_table(write(tmp_path / name, content), label_separator=",").rows
    assert [row.labels for row in rows] == [("a", "b"), ()]


def test_the_one_line_of_trec_that_is_no_utf_8(data, tmp_path) -> None:
    source = data / "classification" / "trec6" / "TREC.train"
    if not source.is_file():
        pytest.skip(f"no {source}")
    lines = [line.replace(b" ", b"\t", 1) for line in source.read_bytes().split(b"\n") if line]
    path = write(tmp_path / "trec.tsv", b"\n".join([b"label\ttext", *lines]))
    with pytest.raises(InputError, match="--encoding names another"):
        read_table(path)
    rows = read_table(path, form=FileFormat("iso-8859-1")).rows
    assert len(rows) == 5452 and sum("sister\xf0city" in row.text for row in rows) == 1


def test_sts_benchmark_without_a_header_and_with_more_fields(data) -> None:
    folder = data / "pairs" / "stsb"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    names = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")
    test = read_records(folder / "sts-test.tsv", FileFormat(columns=names))
    assert len(test.rows) == 1379 and test.surplus > 0 and not test.quoted
    # an unclosed quote would swallow the lines after it
    assert len(read_records(folder / "train.tsv").rows) == 5749
