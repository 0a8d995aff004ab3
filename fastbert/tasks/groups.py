"""Texts that belong together: pairs, triplets, scored pairs, single texts, and collections."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.tasks.columns import SCORES, listed
from fastbert.tasks.records import (
    FileFormat,
    Record,
    Records,
    number_field,
    read_records,
    refuse_half_characters,
    text_field,
    text_lines,
)

ACCEPTED = (
    "pairs (anchor, positive), triplets (anchor, positive, negative), scored pairs (two texts and "
    "a score) in .tsv, .csv or .jsonl; one text a line in .txt, or a field text in .jsonl; to "
    "score on also a folder with corpus.jsonl, queries.jsonl and qrels.tsv"
)
_ALONE = ("text", "sentence")
KINDS = ("pairs", "scored", "texts", "collection")
_ANCHORS = ("anchor", "query", "question", "sentence1", "text_a", "premise", "title", "text")
_POSITIVES = ("positive", "pos", "answer", "passage", "sentence2", "text_b", "hypothesis", "body")
_NEGATIVES = re.compile(r"(?:hard_?)?neg(?:ative)?s?(?:_?\d+)?")


class Group(NamedTuple):
    """One example.

    Attributes:
        texts: anchor, positive, and any number of negatives; or one text.
        score: of a scored pair.
        line: in its file.
        id: of a document or query of a collection.
    """

    texts: tuple[str, ...]
    score: float | None = None
    line: int = 0
    id: str = ""


@dataclass
class Groups(list[Group]):
    """A file's examples.

    Attributes:
        kind: of `KINDS`; in a collection queries come first, then documents.
        queries: of a collection.
        gains: of a collection, a query's judged documents.
        remarks: on the reading.
    """

    kind: str = "pairs"
    queries: int = 0
    gains: dict[str, dict[str, float]] = field(default_factory=dict)
    remarks: str = ""


def read_groups(path: Path, form: FileFormat) -> Groups:
    """Read a file or folder.

    Raises:
        InputError: no such file, or columns that say nothing.
    """
    if path.is_dir():
        return _read_collection(path, form.encoding)
    if not path.is_file():
        raise InputError(f"{path}: no such file; {ACCEPTED} are read")
    if path.name.lower().endswith((".txt", ".txt.gz")):
        lines = [line for line in text_lines(path, form.encoding) if line.text.strip()]
        if not lines:
            raise InputError(f"{path}: no text; {ACCEPTED} are read")
        found = Groups(kind="texts", remarks="one text a line")
        found.extend(Group((line.text,), line=line.number) for line in lines)
        return found
    records = read_records(path, dataclasses.replace(form, fewest=1))
    known = {name.strip().lower(): name for name in reversed(records.names)}
    alone = _text_alone(records)
    if alone is not None:
        found = Groups(kind="texts", remarks=f"column {alone!r} alone{records.remarks()}")
        for record in records.rows:
            text = text_field(f"{path}:{record.line}", record.fields, alone)
            found.append(Group((text,), line=record.line))
        return found
    first, second, score, negatives = _columns(path, known, records)
    found = Groups(kind="pairs" if score is None else "scored")
    for record in records.rows:
        found.append(_group(f"{path}:{record.line}", record, first, second, score, negatives))
    columns = [first, second, *([score] if score else []), *negatives]
    found.remarks = f"columns {listed(columns)} (guessed){records.remarks()}"
    return found


def _text_alone(records: Records) -> str | None:
    """The only text column of a .jsonl of plain sentences; an id may stand beside it."""
    if records.path.suffix.lower() in (".tsv", ".csv"):
        return None
    names = [name for name in records.names if name.lower() not in ("id", "_id")]
    return names[0] if len(names) == 1 and names[0].lower() in _ALONE else None


def _columns(
    path: Path, known: dict[str, str], records: Records
) -> tuple[str, str, str | None, list[str]]:
    first = next((known[name] for name in _ANCHORS if name in known), None)
    second = next((known[n] for n in _POSITIVES if n in known and known[n] != first), None)
    if first is None or second is None:
        raise InputError(
            f"{path}: cannot tell which columns hold the texts; there are {listed(records.names)}; "
            f"{ACCEPTED} are read"
        )
    score = next((known[name] for name in SCORES if name in known), None)
    negatives = [name for low, name in known.items() if _NEGATIVES.fullmatch(low)]
    return first, second, None if negatives else score, sorted(negatives)


def _group(
    where: str,
    record: Record,
    first: str,
    second: str,
    score: str | None,
    negatives: Sequence[str],
) -> Group:
    fields = record.fields
    texts = [text_field(where, fields, name) for name in (first, second)]
    for name in negatives:
        values = fields.get(name)
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):
                raise InputError(f"{where}: field {name!r} must be text or a list of texts")
            refuse_half_characters(where, name, value)
            texts.append(value)
    found = None if score is None else number_field(where, fields, score)
    return Group(tuple(texts), found, record.line)


def _read_collection(folder: Path, encoding: str) -> Groups:
    names = ("queries.jsonl", "corpus.jsonl", "qrels.tsv")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: no file {missing[0]}; {ACCEPTED} are read")
    found = Groups(kind="collection")
    ids: list[set[str]] = []
    for name in names[:2]:
        ids.append(set())
        for record in read_records(folder / name, FileFormat(encoding)).rows:
            where = f"{folder / name}:{record.line}"
            found.append(_document(where, record))
            if found[-1].id in ids[-1]:
                raise InputError(f"{where}: the id {found[-1].id!r} was there before")
            ids[-1].add(found[-1].id)
        found.queries = found.queries or len(found)
    judged = strange = 0
    for text, number in text_lines(folder / names[2], encoding):
        fields = text.split("\t")
        # a header, as in the layout of BEIR
        if not text.strip() or (number == 1 and fields[-1].strip() == "score"):
            continue
        if len(fields) not in (3, 4):
            raise InputError(
                f"{folder / names[2]}:{number}: {counted(len(fields), 'field')}; query, document "
                "and gain are wanted, with tabs between"
            )
        where = f"{folder / names[2]}:{number}"
        gain = number_field(where, {"score": fields[-1].strip()}, "score")
        found.gains.setdefault(fields[0], {})[fields[-2]] = gain
        judged += 1
        strange += fields[0] not in ids[0] or fields[-2] not in ids[1]
    if not any(gain > 0 for q in ids[0] for gain in found.gains.get(q, {}).values()):
        raise InputError(f"{folder}: no query has a relevant document in {names[2]}")
    documents = len(found) - found.queries
    found.remarks = (
        f"{found.queries:,} queries, {counted(documents, 'document')}, "
        f"{counted(judged, 'judgement')}"
    )
    if strange:
        found.remarks += f", {strange:,} of them of a query or document that is not there"
    return found


def _document(where: str, record: Record) -> Group:
    fields = record.fields
    named = next((name for name in ("_id", "id") if name in fields), None)
    if named is None:
        raise InputError(f"{where}: no field '_id'; there are {listed(fields)}")
    title = text_field(where, fields, "title") if fields.get("title") else ""
    text = text_field(where, fields, "text")
    return Group((f"{title} {text}".strip(),), line=record.line, id=str(fields[named]))
