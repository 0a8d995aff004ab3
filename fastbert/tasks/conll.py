"""Sentences with tags: CoNLL columns, and jsonl of words with tags or of text with spans."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.metrics.entities import OUTSIDE, Entity
from fastbert.tasks.records import (
    FileFormat,
    Record,
    read_records,
    refuse_half_characters,
    text_lines,
)

ACCEPTED = (
    "a word and its tag a line, with white space between and an empty line between sentences; "
    "or .jsonl with words and tags, or text and entities"
)
_DOCUMENT = "-DOCSTART-"
_WORDS = ("tokens", "words")
_BETWEEN = re.compile(r"[ \t]+")
_TAGS = ("tags", "ner_tags", "labels", "ner", "slots")
_SPANS = ("entities", "spans", "slots", "label", "labels")
# runs of letters and digits, Chinese characters one by one, anything else by itself
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LETTER = re.compile(rf"[^\W{_HAN}]")
# marks, and characters without width such as the joiners of Persian and Hindi
_JOINED = ("Mn", "Mc", "Me", "Cf")
_WORD = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+(?:['\u2019._@-][^\W{_HAN}]+)*|[^\w\s]|_")


class Sentence(NamedTuple):
    """One example.

    Attributes:
        words: of the sentence.
        tags: one a word; None where they are asked for.
        line: in its file, counted from 1.
        text: that the words were cut from; None where they came as words.
        offsets: characters of each word in `text`.
        intent: what is wanted, in the task of that name.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    line: int = 0
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    intent: str | None = None


@dataclass(frozen=True)
class Tagged:
    """A file's sentences, and what is worth saying of the reading."""

    sentences: list[Sentence]
    remarks: str


def read_tagged(path: Path, encoding: str = "utf-8") -> Tagged:
    """Read a file of tagged sentences.

    Raises:
        InputError: no such file, or naming the line that does not fit the others.
    """
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; {ACCEPTED}")
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path, encoding)
    return _read_columns(path, encoding)


def _read_columns(path: Path, encoding: str) -> Tagged:
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    width = start = documents = 0
    separator: str | None = None
    for text, number in text_lines(path, encoding):
        # some files put white space where others put nothing
        if not text.strip():
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags), start))
                words, tags = [], []
            continue
        if not width:
            separator = "\t" if "\t" in text else None
        # a wide or unbreakable space is a word in some files, as any other character
        fields = text.split("\t") if separator else [f for f in _BETWEEN.split(text) if f]
        fields[-1] = fields[-1].strip()
        if fields[0].strip() == _DOCUMENT:
            documents += 1
            continue
        width = width or len(fields)
        if len(fields) < 2 or len(fields) != width or not fields[-1]:
            raise InputError(
                f"{path}:{number}: {counted(len(fields), 'column')}, expected {max(width, 2)}: "
                f"{ACCEPTED}"
            )
        start = start if words else number
        words.append(fields[0])
        tags.append(fields[-1])
    if words:
        sentences.append(Sentence(tuple(words), tuple(tags), start))
    if not sentences:
        raise InputError(f"{path}: no sentence; {ACCEPTED}")
    between = "tabs" if separator else "white space"
    skipped = f"; {counted(documents, 'document mark')} skipped" if documents else ""
    return Tagged(sentences, f"first and last of {width} columns, {between} between{skipped}")


def _read_jsonl(path: Path, encoding: str) -> Tagged:
    records = read_records(path, FileFormat(encoding))
    lost = 0
    sentences = []
    for record in records.rows:
        sentence, missed = _sentence(f"{path}:{record.line}", record)
        sentences.append(sentence)
        lost += missed
    cut = f"; {counted(lost, 'entity')} that end inside a word, widened to it" if lost else ""
    return Tagged(sentences, f"{'text' if sentences[0].text is not None else 'words'}{cut}")


def _sentence(where: str, record: Record) -> tuple[Sentence, int]:
    fields = record.fields
    given = next((name for name in _WORDS if name in fields), None)
    if given is not None:
        words = _strings(where, given, fields[given])
        named = next((name for name in _TAGS if name in fields), None)
        if named is None:
            raise InputError(f"{where}: no field of tags; {', '.join(_TAGS)} are looked for")
        tags = _strings(where, named, fields[named])
        if len(words) != len(tags) or not words:
            raise InputError(
                f"{where}: {counted(len(words), 'word')} but {counted(len(tags), 'tag')}"
            )
        return Sentence(words, tags, record.line, intent=_intent(fields)), 0
    text = fields.get("text")
    named = next((name for name in _SPANS if isinstance(fields.get(name), list)), None)
    if not isinstance(text, str) or named is None:
        raise InputError(
            f"{where}: expected words and tags ({', '.join(_WORDS)}; {', '.join(_TAGS)}), or text "
            f"and a list of spans ({', '.join(_SPANS)})"
        )
    refuse_half_characters(where, "text", text)
    words, offsets = split_words(text)
    spans = [_span(where, span, len(text)) for span in fields[named]]
    tags, lost = _tags_of_spans(where, offsets, spans)
    return Sentence(words, tags, record.line, text, offsets, _intent(fields)), lost


def _intent(fields: dict[str, Any]) -> str | None:
    value = fields.get("intent")
    return value if isinstance(value, str) else None


def _strings(where: str, name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: field {name!r} must be a list of strings")
    for value in values:
        refuse_half_characters(where, name, value)
    return tuple(values)


def _span(where: str, span: Any, length: int) -> tuple[int, int, str]:
    if isinstance(span, dict):
        names = (("start", "start_offset"), ("end", "end_offset"), ("label", "type", "entity"))
        values: list[Any] = [next((span[n] for n in known if n in span), None) for known in names]
    else:
        values = list(span) if isinstance(span, list) else []
    if (
        len(values) != 3
        or not all(isinstance(value, int) and not isinstance(value, bool) for value in values[:2])
        or not isinstance(values[2], str)
        or not 0 <= values[0] < values[1] <= length
    ):
        raise InputError(
            f"{where}: a span must have start, end (characters, 0 to {length}) and label, "
            f"got {span!r:.80}"
        )
    return values[0], values[1], values[2]


def _tags_of_spans(
    where: str, offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int, str]]
) -> tuple[tuple[str, ...], int]:
    tags, lost = [OUTSIDE] * len(offsets), 0
    for start, end, kind in sorted(spans):
        inside = [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
        if not inside:
            continue
        if any(tags[number] != OUTSIDE for number in inside):
            raise InputError(f"{where}: the span {start} to {end} ({kind}) overlaps another one")
        lost += offsets[inside[0]][0] != start or offsets[inside[-1]][1] != end
        for number in inside:
            tags[number] = f"{'B' if number == inside[0] else 'I'}-{kind}"
    return tuple(tags), lost


def split_words(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Words and marks of a text, with their characters."""
    found = [match.span() for match in _WORD.finditer(_with_letters_for_marks(text))]
    return tuple(text[start:end] for start, end in found), tuple(found)


def _with_letters_for_marks(text: str) -> str:
    """The same text, as long, where accents, vowel signs and joiners within words are letters.

    They belong to the letter before them, but Python's \\w does not count them in.
    """
    if text.isascii():
        return text
    out: list[str] = []
    for char in text:
        joins = out and _LETTER.match(out[-1]) and unicodedata.category(char) in _JOINED
        out.append("x" if joins else char)
    return "".join(out)


def tags_of(entities: Iterable[Entity], words: int) -> tuple[str, ...]:
    """IOB2 tags of entities that do not overlap."""
    tags = [OUTSIDE] * words
    for entity in entities:
        for place in range(entity.start, entity.end):
            tags[place] = f"{'B' if place == entity.start else 'I'}-{entity.kind}"
    return tuple(tags)
