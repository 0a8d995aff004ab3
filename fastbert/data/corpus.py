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

from fastbert.data.tables import is_table, table_texts
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
_RECORDS = re.compile(r"\.jsonl(\.(gz|zst))?$", re.IGNORECASE)
# a longer one is cut between its lines, so that memory is bounded whatever the text
LONGEST_DOCUMENT = 8_000_000


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
    return _read_all(Reader(find_files(paths, say=say), doc_sep, say))


class Reader:
    """Reads files one at a time and counts what it meets.

    Args:
        files: from `find_files`.
        doc_sep: as for `read_documents`.
        say: told the guesses.

    Attributes:
        empty: documents without text so far, which are skipped.
        cut: places where a document of more than `LONGEST_DOCUMENT` characters was cut.
    """

    def __init__(self, files: Sequence[Path], doc_sep: str, say: Callable[[str], None]) -> None:
        if doc_sep not in DOCUMENT_SEPARATORS:
            raise InputError(f"doc-sep: {doc_sep!r} is not one of {', '.join(DOCUMENT_SEPARATORS)}")
        self.files, self.doc_sep, self.say = files, doc_sep, say
        self.documents = self.empty = self.books = self.cut = self.without_text = 0
        self._guesses: Counter[str] = Counter()
        self._last_guess: str | None = None

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file, those without text left out.

        Raises:
            InputError: as `read_documents` while reading.
        """
        before = self.documents
        for document in self._of(path):
            if _has_text(document.text):
                self.documents += 1
                yield document
            else:
                self.empty += 1
        self.without_text += self.documents == before

    def totals(self) -> str:
        """What was read, in a line.

        Raises:
            InputError: nothing was.
        """
        if not self.documents:
            files = counted(len(self.files), "file")
            raise InputError(f"{self.files[0]}: no readable text in {files}")
        parts = [
            f"corpus: {counted(len(self.files), 'file')}, {counted(self.documents, 'document')}"
        ]
        if len(self._guesses) > 1:
            parts += [
                f"{counted(count, 'file')} {_DESCRIPTION[kind]}"
                for kind, count in self._guesses.items()
            ]
        if self.empty:
            parts.append(f"{counted(self.empty, 'document')} without text skipped")
        if self.without_text:
            parts.append(f"{counted(self.without_text, 'file')} without text")
        if self.cut:
            parts.append(f"long documents cut at {counted(self.cut, 'place')}")
        if self.books:
            parts.append(
                "Project Gutenberg header and licence left out of " + counted(self.books, "file")
            )
        return "; ".join(parts)

    def _of(self, path: Path) -> Iterator[Document]:
        if is_table(path):
            yield from (Document(text, str(path), row) for text, row in table_texts(path))
            return
        if _RECORDS.search(path.name):
            yield from _records(path)
            return
        lines = decoded_lines(path)
        head = list(itertools.islice(lines, _LINES_TO_GUESS_FROM))
        kind = self.doc_sep
        if kind == "auto":
            kind = _guess(head)
            self._guesses[kind] += 1
            if kind != self._last_guess:
                what = _DESCRIPTION[kind]
                self.say(f"{path}: {what} (guessed; --doc-sep blank|line|file to change)")
                self._last_guess = kind
        body = _without_licence(itertools.chain(head, lines), head, self)
        for part in _parts(body, kind, self):
            yield from _documents(part, str(path), kind, _hard_wrapped(head))


def _read_all(reader: Reader) -> Iterator[Document]:
    for path in reader.files:
        yield from reader.read(path)
    reader.say(reader.totals())


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


def _without_licence(lines: Iterable[Line], head: Sequence[Line], reader: Reader) -> Iterator[Line]:
    start = next((line for line in head if _BOOK_START.match(line.text)), None)
    if start is None:
        yield from lines
        return
    reader.books += 1
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


def _parts(lines: Iterable[Line], kind: str, reader: Reader) -> Iterator[Iterable[Line]]:
    """The lines in portions that fit memory, cut between documents where there is a place."""
    if kind == "line":
        yield lines
        return
    part: list[Line] = []
    characters = 0
    for line in lines:
        if characters > LONGEST_DOCUMENT:
            between = _between_documents(line.text.strip(), kind)
            if between or characters > 2 * LONGEST_DOCUMENT:
                reader.cut += not between or kind == "file"
                yield part
                part, characters = [], 0
        part.append(line)
        characters += len(line.text)
    yield part


def _between_documents(text: str, kind: str) -> bool:
    """Whether a document of this kind may begin with this line."""
    if kind == "tags":
        return _DOC_START.match(text) is not None
    if kind == "headings":
        return _HEADING.fullmatch(text) is not None
    return not text


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
