"""Sentences with two marked entities and their relation: SemEval-2010 task 8, tsv and jsonl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import Line
from fastbert.errors import InputError
from fastbert.tasks.records import FileFormat, read_records, text_field, text_lines

ACCEPTED = (
    "SemEval-2010 task 8 (number, tab, sentence with <e1></e1> and <e2></e2>; relation; comment), "
    ".tsv with relation and such a sentence, or .jsonl with text, head, tail (characters) and label"
)
_TAG = re.compile(r"\s?</?e[12]>\s?")
_NUMBERED = re.compile(r"\d+\t")
_LABELS = ("label", "relation")


class Marked(NamedTuple):
    """One example.

    Attributes:
        text: without marks.
        first, second: characters of both entities.
        label: relation, "" where it is asked for.
        line: in its file.
    """

    text: str
    first: tuple[int, int]
    second: tuple[int, int]
    label: str = ""
    line: int = 0


def read_marked(path: Path, encoding: str = "utf-8") -> tuple[list[Marked], str]:
    """Sentences of a file, and which layout it has.

    Raises:
        InputError: no such file, or naming the line that does not fit.
    """
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; {ACCEPTED} are read")
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        records = read_records(path, FileFormat(encoding))
        rows = [marked_of(r.fields, f"{path}:{r.line}", r.line) for r in records.rows]
        return _labelled(path, rows), f"jsonl{records.remarks()}"
    lines = [line for line in text_lines(path, encoding) if line.text.strip()]
    if not lines:
        raise InputError(f"{path}: the file is empty; {ACCEPTED} are read")
    if _NUMBERED.match(lines[0].text):
        return _labelled(path, _blocks(path, lines)), "SemEval-2010 task 8"
    return _labelled(path, [_row(path, line) for line in lines]), "relation and marked sentence"


def _labelled(path: Path, rows: list[Marked]) -> list[Marked]:
    bare = next((row for row in rows if not row.label), None)
    if bare is not None:
        raise InputError(f"{path}:{bare.line}: no relation; {ACCEPTED} are read")
    return rows


def _blocks(path: Path, lines: list[Line]) -> list[Marked]:
    rows = []
    place = 0
    while place < len(lines):
        where = f"{path}:{lines[place].number}"
        found = _NUMBERED.match(lines[place].text)
        if not found or place + 1 >= len(lines):
            raise InputError(f"{where}: expected a number, a tab and a sentence; then its relation")
        sentence = lines[place].text[found.end() :].strip()
        if len(sentence) > 1 and sentence[0] == sentence[-1] == '"':
            sentence = sentence[1:-1]
        label = lines[place + 1].text.strip()
        rows.append(unmark(sentence, where, label, lines[place].number))
        place += 2
        if place < len(lines) and lines[place].text.startswith("Comment:"):
            place += 1
    return rows


def _row(path: Path, line: Line) -> Marked:
    label, tab, sentence = line.text.partition("\t")
    if not tab:
        raise InputError(f"{path}:{line.number}: no tab; {ACCEPTED} are read")
    return unmark(sentence, f"{path}:{line.number}", label.strip(), line.number)


def unmark(sentence: str, where: str, label: str = "", line: int = 0) -> Marked:
    """Take <e1>, </e1>, <e2>, </e2> out of a sentence.

    Raises:
        InputError: a mark that is missing, doubled or crossed.
    """
    pieces: list[str] = []
    marks: dict[str, int] = {}
    length = last = 0
    for found in _TAG.finditer(sentence):
        mark = found.group().strip()
        piece = sentence[last : found.start()]
        closing = mark.startswith("</")
        # a space outside of the entity parts two words; one inside is the mark's own
        space = " " if found.group()[-1 if closing else 0].isspace() else ""
        piece += "" if closing else space
        marks[mark] = length + len(piece) if mark not in marks else -1
        piece += space if closing else ""
        pieces.append(piece)
        length += len(piece)
        last = found.end()
    pieces.append(sentence[last:])
    places = [marks.get(mark, -1) for mark in ("<e1>", "</e1>", "<e2>", "</e2>")]
    if min(places) < 0 or len(marks) != 4 or places[0] >= places[1] or places[2] >= places[3]:
        raise InputError(
            f"{where}: expected one <e1>...</e1> and one <e2>...</e2>: {sentence!r:.80}"
        )
    text = "".join(pieces)
    return Marked(text, (places[0], places[1]), (places[2], places[3]), label, line)


def marked_of(fields: Any, where: str, line: int = 0) -> Marked:
    """A sentence from fields: marked text, or text with the characters of head and tail.

    Raises:
        InputError: neither.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{where}: a dictionary is wanted, with text, head and tail")
    named = next((name for name in ("text", "sentence") if name in fields), "text")
    text = text_field(where, fields, named)
    label = next((str(fields[name]) for name in _LABELS if fields.get(name) is not None), "")
    if "<e1>" in text:
        return unmark(text, where, label, line)
    spans = [_span(where, fields, names, len(text)) for names in (("head", "e1"), ("tail", "e2"))]
    return Marked(text, spans[0], spans[1], label, line)


def _span(
    where: str, fields: dict[str, Any], names: tuple[str, str], length: int
) -> tuple[int, int]:
    given = next((fields[name] for name in names if name in fields), None)
    if isinstance(given, dict):
        given = [given.get("start"), given.get("end")]
    if (
        not isinstance(given, list | tuple)
        or len(given) != 2
        or not all(isinstance(value, int) and not isinstance(value, bool) for value in given)
        or not 0 <= given[0] < given[1] <= length
    ):
        raise InputError(
            f"{where}: field {names[0]!r} must be start and end (characters, 0 to {length}), "
            f"got {given!r:.60}"
        )
    return given[0], given[1]
