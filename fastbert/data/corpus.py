"""Text files to documents, and documents to sentences.

The steps: files -> decoded lines (text_files) -> documents (here) -> sentences (sentences).
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastbert.data.text_files import Line, counted, decoded_lines, find_files, is_unicode
from fastbert.errors import InputError

DOCUMENT_SEPARATORS = ("auto", "blank", "line", "file")

_DESCRIPTION = {
    "blank": "documents separated by blank lines",
    "line": "one document a line",
    "file": "one document a file",
    "tags": "one document a <doc> block",
    "headings": "one document a level-one wiki heading",
}
_DOC_START = re.compile(r'<doc\b[^>]*?(?:title="(?P<title>[^"]*)")?[^">]*>\s*')
_BOOK_START = re.compile(r"\*\*\* ?START OF (?:THIS|THE) PROJECT GUTENBERG EBOOK", re.IGNORECASE)
_BOOK_END = re.compile(r"(?:\*\*\* ?)?END OF (?:THIS |THE )?PROJECT GUTENBERG", re.IGNORECASE)
_HEADING = re.compile(r"= [^=]+ =")
_LINES_TO_GUESS_FROM = 4000


class Document(NamedTuple):
    """A text whose sentences follow one another, and where it begins."""

    text: str  # paragraphs or lines separated by "\n"
    path: str
    line: int  # counted from 1


def read_documents(
    paths: Sequence[str | os.PathLike[str]],
    *,
    doc_sep: str = "auto",
    say: Callable[[str], None] = print,
) -> Iterator[Document]:
    """Read every document of the files, in the order given, folders sorted.

    Args:
        paths: files, globs or folders (searched below for .txt, .jsonl, .gz and wiki_00 files). A
            file named outright may have any name; .jsonl and .gz are told by their ending.
        doc_sep: "blank" (documents separated by blank lines), "line" (one a line), "file" (one a
            file), or "auto": looked for in each text file and said. `<doc>` blocks as WikiExtractor
            writes them count as documents under "auto"; a .jsonl record is always one.
        say: told the guess, what was skipped, and the totals at the end.

    Raises:
        InputError: at once for a path that does not exist or holds nothing; while reading for
            bytes that are not UTF-8, broken records and archives, and where no text is found.
    """
    if doc_sep not in DOCUMENT_SEPARATORS:
        raise InputError(f"doc-sep: {doc_sep!r} is not one of {', '.join(DOCUMENT_SEPARATORS)}")
    files = find_files(paths, say=say)
    return _read_all(files, doc_sep, say)


class _Tally:
    """What was met on the way, for the totals."""

    def __init__(self) -> None:
        self.documents = 0
        self.empty = 0
        self.books = 0
        self.guesses: Counter[str] = Counter()


def _read_all(files: list[Path], doc_sep: str, say: Callable[[str], None]) -> Iterator[Document]:
    tally = _Tally()
    without_text = 0
    last_guess = None
    for path in files:
        before = tally.documents
        if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
            documents = _records(path)
        else:
            lines = decoded_lines(path)
            head = list(itertools.islice(lines, _LINES_TO_GUESS_FROM))
            kind = _guess(head) if doc_sep == "auto" else doc_sep
            if doc_sep == "auto" and kind != last_guess:
                say(f"{path}: {_DESCRIPTION[kind]} (guessed; --doc-sep blank|line|file to change)")
                last_guess = kind
            tally.guesses[kind] += 1
            wrapped = _hard_wrapped(head)
            body = _without_licence(itertools.chain(head, lines), head, tally)
            documents = _documents(body, str(path), kind, wrapped)
        for document in documents:
            if _has_text(document.text):
                tally.documents += 1
                yield document
            else:
                tally.empty += 1
        without_text += tally.documents == before
    if not tally.documents:
        raise InputError(f"{files[0]}: no readable text in {counted(len(files), 'file')}")
    say(_totals(len(files), without_text, tally, guessed=doc_sep == "auto"))


def _totals(files: int, without_text: int, tally: _Tally, *, guessed: bool) -> str:
    parts = [f"corpus: {counted(files, 'file')}, {counted(tally.documents, 'document')}"]
    if guessed and len(tally.guesses) > 1:
        parts += [
            f"{counted(count, 'file')} {_DESCRIPTION[kind]}"
            for kind, count in tally.guesses.items()
        ]
    if tally.empty:
        parts.append(f"{counted(tally.empty, 'document')} without text skipped")
    if without_text:
        parts.append(f"{counted(without_text, 'file')} without text")
    if tally.books:
        parts.append(
            f"Project Gutenberg header and licence left out of {counted(tally.books, 'file')}"
        )
    return "; ".join(parts)


def _records(path: Path) -> Iterator[Document]:
    for line in decoded_lines(path):
        if not line.text.strip():
            continue
        where = f"{path}:{line.number}"
        try:
            record = json.loads(line.text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON that can be read: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise InputError(f"{where}: a JSON object with a `text` field is wanted, got {kind}")
        text = record.get("text")
        if not isinstance(text, str):
            fields = ", ".join(map(str, record)) or "none"
            raise InputError(f"{where}: no `text` field with a string; its fields are: {fields}")
        if not is_unicode(text):
            raise InputError(f"{where}: `text` holds half of a surrogate pair, which is no text")
        yield Document(text, str(path), line.number)


def _guess(head: Sequence[Line]) -> str:
    if any(_DOC_START.match(line.text) for line in head[:100]):
        return "tags"
    if sum(_HEADING.fullmatch(line.text.strip()) is not None for line in head) > 1:
        return "headings"
    # wrapped lines are prose, whose blocks are paragraphs: too short and too close to one another
    # to be the documents that sentence pairs are drawn from
    if _hard_wrapped(head):
        return "file"
    texts = [line.text.strip() for line in head]
    inner = "\n".join(texts).strip("\n").split("\n")
    return "blank" if "" in inner else "line"


def _hard_wrapped(head: Sequence[Line]) -> bool:
    """Whether lines break where the column ends, not where sentences do."""
    broken = total = 0
    for line, following in itertools.pairwise(head):
        text = line.text.strip()
        if not text or not following.text.strip():
            continue
        total += 1
        broken += 45 <= _columns(text) <= 100 and not text.endswith(_LINE_ENDS)
    return total >= 3 and broken / total > 0.5


_LINE_ENDS = (*'.!?:")', *"\u3002\uff01\uff1f\u2026\u201d\u2019\u300d\u300f")


def _columns(text: str) -> int:
    if text.isascii() or len(text) > 100:
        return len(text)
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _without_licence(lines: Iterable[Line], head: Sequence[Line], tally: _Tally) -> Iterator[Line]:
    start = next((line for line in head if _BOOK_START.match(line.text)), None)
    if start is None:
        yield from lines
        return
    tally.books += 1
    marker_open = False
    for line in lines:
        if line.number < start.number:
            continue
        if line.number == start.number or marker_open:
            # the marker may run over several lines
            marker_open = not line.text.rstrip().endswith("***")
            marker_open = marker_open and bool(line.text.strip())
        elif _BOOK_END.match(line.text):
            break
        else:
            yield line


def _documents(lines: Iterable[Line], path: str, kind: str, wrapped: bool) -> Iterator[Document]:
    if kind == "line":
        for line in lines:
            if line.text.strip():
                yield Document(line.text.strip(), path, line.number)
    elif kind == "blank":
        for block in _blocks(lines):
            yield Document(_paragraph(block, wrapped), path, block[0].number)
    elif kind == "tags":
        yield from _tagged(lines, path)
    elif kind == "headings":
        yield from _headed(lines, path)
    else:
        blocks = list(_blocks(lines))
        first = blocks[0][0].number if blocks else 1
        yield Document("\n".join(_paragraph(block, wrapped) for block in blocks), path, first)


def _blocks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    block: list[Line] = []
    for line in lines:
        if line.text.strip():
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _paragraph(block: Sequence[Line], wrapped: bool) -> str:
    if not wrapped:
        return "\n".join(line.text.strip() for line in block)
    text = ""
    for line in block:
        piece = line.text.strip()
        # Chinese and Japanese put no space between words
        space = bool(text) and not (_is_wide(text[-1]) and _is_wide(piece[0]))
        text += f" {piece}" if space else piece
    return text


def _is_wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF"


def _tagged(lines: Iterable[Line], path: str) -> Iterator[Document]:
    block: list[str] = []
    title, start = "", 1
    for line in lines:
        text = line.text.strip()
        opening = _DOC_START.match(text)
        if opening or text == "</doc>":
            if block or not opening:
                # a redirect or stub is left with its title alone
                yield Document("" if block == [title] else "\n".join(block), path, start)
            block = []
            if opening:
                title, start = html.unescape(opening["title"] or "").strip(), line.number
        elif text:
            block.append(text)
    if block:
        yield Document("\n".join(block), path, start)


def _headed(lines: Iterable[Line], path: str) -> Iterator[Document]:
    block: list[str] = []
    start = 1
    for line in lines:
        text = line.text.strip()
        if _HEADING.fullmatch(text) and block:
            yield Document("\n".join(block), path, start)
            block = []
        if text:
            start = start if block else line.number
            block.append(text)
    if block:
        yield Document("\n".join(block), path, start)


def _has_text(text: str) -> bool:
    return any(char.isalnum() for char in text)
