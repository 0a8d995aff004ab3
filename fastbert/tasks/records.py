"""Records of tsv, csv and jsonl files: line numbers and fields by name, every row checked."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import Line, counted, decoded_lines, is_unicode
from fastbert.errors import InputError

ACCEPTED = ".tsv, .csv and .jsonl with column names (and .gz of each)"
QUOTING = ("auto", "none", "csv")
# the longest field, in characters, that the csv module is to take
_FIELD_LIMIT = 1 << 30
# lines of a tsv file that are looked at for quotes
_LOOKED_AT = 1000
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class FileFormat:
    """What a file's name does not say.

    Attributes:
        encoding: of the file, as Python names it.
        columns: names of a file without a header line, else None.
        quoting: of a .tsv: "csv" with quotes around fields, "none", or "auto" for a guess.
        fewest: fields a row of .jsonl at least.
    """

    encoding: str = "utf-8"
    columns: tuple[str, ...] | None = None
    quoting: str = "auto"
    fewest: int = 2

    def __post_init__(self) -> None:
        if self.quoting not in QUOTING:
            raise InputError(f"--quoting must be one of {', '.join(QUOTING)}, got {self.quoting!r}")
        refuse_encoding(self.encoding)


class Record(NamedTuple):
    """One row: where it starts, and its fields by column."""

    line: int
    fields: dict[str, Any]


@dataclass
class Records:
    """A file's rows.

    Attributes:
        path: of the file.
        names: of the columns; for jsonl those of the first row.
        rows: in the file's order.
        blank_lines: skipped.
        quoted: whether quotes around the fields of a .tsv were taken off.
        surplus: rows with more fields than named columns, the rest of which is not read.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    blank_lines: int = 0
    quoted: bool = False
    surplus: int = 0

    def remarks(self) -> str:
        """What is worth saying about the reading, to come after the number of rows."""
        parts = []
        if self.quoted:
            parts.append("; quotes around fields taken off (guessed; --quoting none to change)")
        if self.surplus:
            parts.append(f"; {counted(self.surplus, 'row')} with more fields than columns named")
        if self.blank_lines:
            parts.append(f"; {counted(self.blank_lines, 'blank line')} skipped")
        return "".join(parts)


def read_records(path: Path, form: FileFormat | None = None) -> Records:
    """Read a file.

    Raises:
        InputError: no such file, an empty or undecodable one, or a row that does not fit the
            header.
    """
    form = form or FileFormat()
    kind = kind_of(path)
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; {ACCEPTED} are read")
    found = Records(path)
    lines = text_lines(path, form.encoding)
    if kind == ".jsonl":
        found.rows = list(_json_records(lines, form.fewest, found))
    else:
        found.rows = list(_delimited_records(lines, kind, form, found))
    if not found.rows:
        raise InputError(f"{path}: no rows; {ACCEPTED} are read")
    found.names = found.names or list(found.rows[0].fields)
    return found


def kind_of(path: Path) -> str:
    """ ".tsv", ".csv" or ".jsonl", by the name.

    Raises:
        InputError: none of them.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl"):
        raise InputError(f"{path}: not a table by its name; {ACCEPTED} are read")
    return kind


def refuse_encoding(encoding: str) -> None:
    """Look whether lines of bytes can be decoded one by one.

    Raises:
        InputError: no such encoding, or one in which ASCII has other bytes.
    """
    ascii_line = b"a,1\t\n"
    try:
        keeps_ascii = ascii_line.decode(encoding) == ascii_line.decode("ascii")
    except LookupError:
        raise InputError(
            f"--encoding: Python knows no encoding {encoding!r}; utf-8 and iso-8859-1 "
            "are among those it knows"
        ) from None
    except UnicodeError:
        keeps_ascii = False
    if not keeps_ascii:
        raise InputError(
            f"--encoding {encoding}: is read only where ASCII stays ASCII, as in utf-8, "
            "iso-8859-1 or gb18030; write the file in one of those"
        )


def text_lines(path: Path, encoding: str = "utf-8") -> Iterator[Line]:
    """The lines of a file in any encoding that keeps ASCII; a byte order mark is dropped.

    Raises:
        InputError: no such encoding, undecodable bytes, or a file that cannot be read.
    """
    refuse_encoding(encoding)
    try:
        yield from decoded_lines(path, encoding)
    except InputError as error:
        hint = "; --encoding names another" if ": not " in str(error) else ""
        raise InputError(f"{error}{hint}") from None


def _delimited_records(
    lines: Iterator[Line], kind: str, form: FileFormat, found: Records
) -> Iterator[Record]:
    if kind == ".csv":
        records, separator = _csv_records(lines, ",", found), "commas"
    else:
        first = list(islice(lines, _LOOKED_AT))
        found.quoted = form.quoting == "csv" or (form.quoting == "auto" and _looks_quoted(first))
        lines, separator = chain(first, lines), "tabs"
        records = _csv_records(lines, "\t", found) if found.quoted else _bare_records(lines, found)
    if form.columns is not None:
        found.names = list(form.columns)
    else:
        header = next(records, None)
        if header is None:
            raise InputError(f"{found.path}: the file is empty; {ACCEPTED} are read")
        found.names = header[1]
        _check_header(f"{found.path}:{header[0]}", found.names, separator)
    for line, fields in records:
        if form.columns is not None and len(fields) > len(found.names):
            found.surplus += 1
            fields = fields[: len(found.names)]
        if len(fields) != len(found.names):
            named = "--columns names" if form.columns is not None else "the header has"
            raise InputError(
                f"{found.path}:{line}: {counted(len(fields), 'field')}, {named} "
                f"{len(found.names)}; fields are separated by {separator}"
            )
        yield Record(line, dict(zip(found.names, fields, strict=True)))


def _check_header(where: str, names: Sequence[str], separator: str) -> None:
    if len(names) < 2:
        raise InputError(
            f"{where}: the header names one column, {names[0]!r}; at least a text and a "
            f"label are needed, separated by {separator}"
        )
    repeated = [name for number, name in enumerate(names) if name and name in names[:number]]
    if repeated:
        raise InputError(f"{where}: the header names the column {repeated[0]!r} twice")


def _looks_quoted(lines: Sequence[Line]) -> bool:
    """Every field with a quote is a quoted one, and only a writer that quotes would write some."""
    fields = [field for line in lines for field in line.text.split("\t") if '"' in field]
    if not fields or not all(_QUOTED.fullmatch(field) for field in fields):
        return False
    header = lines[0].text.split("\t")
    return all(_QUOTED.fullmatch(field) for field in header) or any(
        '""' in field[1:-1] for field in fields
    )


def _bare_records(lines: Iterator[Line], found: Records) -> Iterator[tuple[int, list[str]]]:
    for text, number in lines:
        if text:
            yield number, text.split("\t")
        else:
            found.blank_lines += 1


def _csv_records(
    lines: Iterator[Line], delimiter: str, found: Records
) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader((line.text + "\n" for line in lines), delimiter=delimiter, strict=True)
    while True:
        # where the record starts: one with line ends in quotes covers several lines
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{found.path}:{line}: not valid csv: {error}") from None
        if fields:
            yield line, fields
        else:
            found.blank_lines += 1


def _json_records(lines: Iterator[Line], fewest: int, found: Records) -> Iterator[Record]:
    for text, number in lines:
        if not text.strip():
            found.blank_lines += 1
            continue
        record = json_object(text, f"{found.path}:{number}")
        if len(record) < fewest:
            raise InputError(
                f"{found.path}:{number}: {counted(len(record), 'field')}; at least a text and a "
                "label are needed"
            )
        yield Record(number, record)


def json_object(text: str, where: str) -> dict[str, Any]:
    """One line of jsonl.

    Raises:
        InputError: no JSON object.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def text_field(where: str, fields: dict[str, Any], name: str) -> str:
    """A field that must be text; null is empty.

    Raises:
        InputError: no such field, no text, or half of a surrogate pair.
    """
    if name not in fields:
        known = ", ".join(repr(other) for other in fields)
        raise InputError(f"{where}: no field {name!r}; there are {known}")
    value = fields[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} must be text, got {json.dumps(value)}")
    refuse_half_characters(where, name, value)
    return value


def number_field(where: str, fields: dict[str, Any], name: str) -> float:
    """A field that must be a finite number.

    Raises:
        InputError: anything else.
    """
    value = fields.get(name)
    try:
        number = float("nan") if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise InputError(f"{where}: field {name!r} must be a number, got {value!r}")
    return number


def refuse_half_characters(where: str, name: str, value: str) -> None:
    """JSON may hold half of a character, which no file can.

    Raises:
        InputError: naming the field.
    """
    if not is_unicode(value):
        raise InputError(
            f"{where}: field {name!r} holds half of a surrogate pair, which is no text"
        )
