"""Labelled texts from tsv, csv and jsonl files, every row checked."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import counted, decoded_lines, is_unicode
from fastbert.errors import InputError
from fastbert.tasks.columns import Columns, guess_columns, listed

ACCEPTED = ".tsv, .csv and .jsonl with column names (and .gz of each)"
# the longest field, in characters, that the csv module is to take
_FIELD_LIMIT = 1 << 30


class Row(NamedTuple):
    """One example."""

    text: str
    label: str = ""
    second: str | None = None  # of a pair
    line: int = 0  # in its file, counted from 1


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: of the file.
        columns: which were read.
        rows: all rows, in the file's order.
        guessed: whether a column was guessed.
        empty_texts: rows without text, which are kept.
        blank_lines: lines with nothing on them, which are skipped.
    """

    path: Path
    columns: Columns
    rows: list[Row]
    guessed: bool
    empty_texts: int
    blank_lines: int = 0

    def describe(self) -> str:
        """What was read and what was guessed, in one line."""
        second = f", second text column {self.columns.pair!r}" if self.columns.pair else ""
        flags = ["--text-column", *(["--pair-column"] if second else []), "--label-column"]
        guess = f" (guessed; {', '.join(flags)} to change)" if self.guessed else ""
        empty = f"; {counted(self.empty_texts, 'row')} without text, kept"
        blank = f"; {counted(self.blank_lines, 'blank line')} skipped"
        return (
            f"{self.path}: {counted(len(self.rows), 'row')}, text column {self.columns.text!r}"
            f"{second}, label column {self.columns.label!r}{guess}"
            f"{empty if self.empty_texts else ''}{blank if self.blank_lines else ''}"
        )


def read_table(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
) -> Table:
    """Read a file of labelled texts.

    Args:
        path: .tsv (no quoting, as GLUE has it), .csv (quoted where needed) or .jsonl (an object a
            line), plain or .gz, UTF-8.
        text_column, label_column: names; guessed where None.
        pair_column: name of the second text; guessed where text_column is None as well, "" for
            one text a row.

    Raises:
        InputError: no such file, an empty or undecodable one, a column that is not there or cannot
            be guessed, a row that does not fit the header or has no label.
    """
    path = Path(path)
    kind = _kind(path)
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; {ACCEPTED} are read")
    blank: list[int] = []
    read = _json_records if kind == ".jsonl" else _delimited_records
    records = read(path, blank)
    first = next(records, None)
    if first is None:
        raise InputError(f"{path}: no rows; {ACCEPTED} are read")
    names = list(first[1])
    asked = {"--text-column": text_column, "--pair-column": pair_column or None}
    asked["--label-column"] = label_column
    _check_named(path, names, asked)
    columns = guess_columns(names, text_column, pair_column, label_column, where=str(path))
    rows = [_row(path, first, columns)]
    rows += [_row(path, record, columns) for record in records]
    guessed = text_column is None or label_column is None
    empty = sum(not row.text.strip() and not (row.second or "").strip() for row in rows)
    return Table(path, columns, rows, guessed, empty, len(blank))


def read_same_columns(path: str | os.PathLike[str], like: Table) -> Table:
    """Read another file by the columns of the first, e.g. an evaluation file by its training file.

    Raises:
        InputError: as `read_table`.
    """
    columns = like.columns
    table = read_table(
        path,
        text_column=columns.text,
        pair_column=columns.pair or "",
        label_column=columns.label,
    )
    return replace(table, guessed=like.guessed)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise InputError(f"{path}: not a table by its name; {ACCEPTED} are read")
    return kind


def _check_named(path: Path, names: list[str], asked: Mapping[str, str | None]) -> None:
    for flag, name in asked.items():
        if name is not None and name not in names:
            raise InputError(f"{path}: no column {name!r} ({flag}); there are {listed(names)}")


# a record is its line number and its fields by column
_Record = tuple[int, dict[str, Any]]


# each reader appends the numbers of the lines it skips to `blank`
def _delimited_records(path: Path, blank: list[int]) -> Iterator[_Record]:
    is_csv = _kind(path) == ".csv"
    records = _csv_records(path, blank) if is_csv else _tsv_records(path, blank)
    separator = "commas" if is_csv else "tabs"
    header = next(records, None)
    if header is None:
        raise InputError(f"{path}: the file is empty; {ACCEPTED} are read")
    line, names = header
    if len(names) < 2:
        raise InputError(
            f"{path}:{line}: the header names one column, {names[0]!r}; at least a text and a "
            f"label are needed, separated by {separator}"
        )
    repeated = [name for number, name in enumerate(names) if name and name in names[:number]]
    if repeated:
        raise InputError(f"{path}:{line}: the header names the column {repeated[0]!r} twice")
    for line, fields in records:
        if len(fields) != len(names):
            raise InputError(
                f"{path}:{line}: {counted(len(fields), 'field')}, the header has {len(names)}; "
                f"fields are separated by {separator}"
            )
        yield line, dict(zip(names, fields, strict=True))


def _tsv_records(path: Path, blank: list[int]) -> Iterator[tuple[int, list[str]]]:
    for text, number in decoded_lines(path):
        if text:
            yield number, text.split("\t")
        else:
            blank.append(number)


def _csv_records(path: Path, blank: list[int]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader((line.text + "\n" for line in decoded_lines(path)), strict=True)
    while True:
        # where the record starts: one with line ends in quotes covers several lines
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}:{line}: not valid csv: {error}") from None
        if fields:
            yield line, fields
        else:
            blank.append(line)


def _json_records(path: Path, blank: list[int]) -> Iterator[_Record]:
    for text, number in decoded_lines(path):
        if not text.strip():
            blank.append(number)
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON that can be read: {error}") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}:{number}: expected a JSON object, found {type(record).__name__}"
            )
        if len(record) < 2:
            raise InputError(
                f"{path}:{number}: {counted(len(record), 'field')}; at least a text and a label "
                "are needed"
            )
        yield number, record


def _row(path: Path, record: _Record, columns: Columns) -> Row:
    line, fields = record
    missing = [name for name in columns.wanted if name not in fields]
    if missing:
        raise InputError(f"{path}:{line}: no field {missing[0]!r}; there are {listed(fields)}")
    texts = [_text(path, line, name, fields[name]) for name in columns.wanted[:-1]]
    label = _label(path, line, columns.label, fields[columns.label])
    return Row(texts[0], label, texts[1] if columns.pair is not None else None, line)


def _text(path: Path, line: int, name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{path}:{line}: field {name!r} must be text, got {json.dumps(value)}")
    _refuse_half_characters(path, line, name, value)
    return value


def _refuse_half_characters(path: Path, line: int, name: str, value: str) -> None:
    if not is_unicode(value):
        raise InputError(
            f"{path}:{line}: field {name!r} holds half of a surrogate pair, which is no text"
        )


def _label(path: Path, line: int, name: str, value: Any) -> str:
    if isinstance(value, dict | list):
        raise InputError(f"{path}:{line}: field {name!r} must be one label, got a list or object")
    if value is not None and not isinstance(value, str):
        return json.dumps(value)
    label = (value or "").strip()
    _refuse_half_characters(path, line, name, label)
    if not label:
        raise InputError(f"{path}:{line}: the label (column {name!r}) is empty")
    return label
