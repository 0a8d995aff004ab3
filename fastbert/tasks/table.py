"""Labelled texts from tsv, csv and jsonl files, every row checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.tasks.columns import LABELS, Columns, guess_columns, listed
from fastbert.tasks.records import (
    FileFormat,
    Record,
    read_records,
    refuse_half_characters,
    text_field,
)


class Row(NamedTuple):
    """One example."""

    text: str
    label: str = ""
    second: str | None = None  # of a pair
    line: int = 0  # in its file, counted from 1
    labels: tuple[str, ...] = ()  # where there may be any number of them


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        path: of the file.
        columns: which were read.
        rows: all rows, in the file's order.
        guessed: whether a column was guessed.
        empty_texts: rows without text, which are kept.
        remarks: on the reading, for `describe`.
    """

    path: Path
    columns: Columns
    rows: list[Row]
    guessed: bool
    empty_texts: int
    remarks: str = ""

    def describe(self) -> str:
        """What was read and what was guessed, in one line."""
        second = f", second text column {self.columns.pair!r}" if self.columns.pair else ""
        flags = ["--text-column", *(["--pair-column"] if second else []), "--label-column"]
        guess = f" (guessed; {', '.join(flags)} to change)" if self.guessed else ""
        empty = f"; {counted(self.empty_texts, 'row')} without text, kept"
        return (
            f"{self.path}: {counted(len(self.rows), 'row')}, text column {self.columns.text!r}"
            f"{second}, label column {self.columns.label!r}{guess}"
            f"{empty if self.empty_texts else ''}{self.remarks}"
        )


def read_table(
    path: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] = LABELS,
    label_separator: str | None = None,
    form: FileFormat | None = None,
) -> Table:
    """Read a file of labelled texts.

    Args:
        path: .tsv (with or without quoting), .csv (quoted where needed) or .jsonl (an object a
            line), plain or .gz.
        text_column, label_column: names; guessed where None.
        pair_column: name of the second text; guessed where text_column is None as well, "" for
            one text a row.
        label_names: what a label column is usually called, for the guess.
        label_separator: between the labels of a row that may have any number of them, which may
            also be a list in jsonl; None for one label a row.
        form: what the file's name does not say.

    Raises:
        InputError: no such file, an empty or undecodable one, a column that is not there or cannot
            be guessed, a row that does not fit the header or has no label.
    """
    path = Path(path)
    records = read_records(path, form)
    asked = {"--text-column": text_column, "--pair-column": pair_column or None}
    asked["--label-column"] = label_column
    _check_named(path, records.names, asked)
    columns = guess_columns(
        records.names, text_column, pair_column, label_column, str(path), label_names
    )
    rows = [_row(path, record, columns, label_separator) for record in records.rows]
    guessed = text_column is None or label_column is None
    empty = sum(not row.text.strip() and not (row.second or "").strip() for row in rows)
    return Table(path, columns, rows, guessed, empty, records.remarks())


def _check_named(path: Path, names: list[str], asked: Mapping[str, str | None]) -> None:
    for flag, name in asked.items():
        if name is not None and name not in names:
            raise InputError(f"{path}: no column {name!r} ({flag}); there are {listed(names)}")


def _row(path: Path, record: Record, columns: Columns, separator: str | None) -> Row:
    where, fields = f"{path}:{record.line}", record.fields
    missing = [name for name in columns.wanted if name not in fields]
    if missing:
        raise InputError(f"{where}: no field {missing[0]!r}; there are {listed(fields)}")
    texts = [text_field(where, fields, name) for name in columns.wanted[:-1]]
    second = texts[1] if columns.pair is not None else None
    value = fields[columns.label]
    if separator is not None:
        labels = _labels(where, columns.label, value, separator)
        return Row(texts[0], separator.join(labels), second, record.line, labels)
    return Row(texts[0], _label(where, columns.label, value), second, record.line)


def _label(where: str, name: str, value: Any) -> str:
    if isinstance(value, dict | list):
        raise InputError(f"{where}: field {name!r} must be one label, got a list or object")
    if value is not None and not isinstance(value, str):
        return json.dumps(value)
    label = (value or "").strip()
    refuse_half_characters(where, name, label)
    if not label:
        raise InputError(f"{where}: the label (column {name!r}) is empty")
    return label


def _labels(where: str, name: str, value: Any, separator: str) -> tuple[str, ...]:
    """A row may have no label at all, so an empty field is none."""
    if isinstance(value, str) or value is None:
        value = [part for part in (value or "").split(separator) if part.strip()]
    found = [_label(where, name, part) for part in (value if isinstance(value, list) else [value])]
    # the order of labels means nothing, and neither does a label twice
    return tuple(sorted(set(found)))
