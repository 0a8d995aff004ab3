"""Questions on texts, with answers that are spans of them: SQuAD's nested and flat files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.tasks.records import FileFormat, read_records, text_field, text_lines

ACCEPTED = (
    ".json as SQuAD has it (data, paragraphs, qas), or .jsonl with question, context and answers"
)


class Question(NamedTuple):
    """One example.

    Attributes:
        id: the file's, or its number.
        question, context: texts.
        answers: accepted ones; none where there is no answer.
        starts: the character of each in the context.
        line: in its file, 0 in a nested one.
        labelled: whether the answers are known.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    line: int = 0
    labelled: bool = False


def read_questions(path: Path, encoding: str = "utf-8") -> tuple[list[Question], str]:
    """Questions of a file, and what is worth saying of the reading.

    Raises:
        InputError: no such file, another layout, or an answer that is not where it says.
    """
    if not path.is_file():
        problem = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {problem}; {ACCEPTED} is read")
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        records = read_records(path, FileFormat(encoding))
        found = [
            question(f"{path}:{record.line}", record.fields, str(number), record.line)
            for number, record in enumerate(records.rows)
        ]
        return found, f"flat{records.remarks()}"
    text = "\n".join(line.text for line in text_lines(path, encoding))
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not JSON that can be read: {error}; {ACCEPTED} is read"
        ) from None
    if isinstance(raw, dict) and isinstance(raw.get("data"), list):
        raw = raw["data"]
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{path}: no list of articles or questions; {ACCEPTED} is read")
    if isinstance(raw[0], dict) and "paragraphs" in raw[0]:
        found = list(_nested(path, raw))
        articles = counted(len(raw), "article")
        return found, f"nested, {articles}"
    flat = [
        question(f"{path}: question {number}", fields, str(number))
        for number, fields in enumerate(raw, 1)
    ]
    return flat, "flat"


def _nested(path: Path, articles: list[Any]) -> Iterator[Question]:
    for number, article in enumerate(articles, 1):
        try:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    fields = {**asked, "context": paragraph["context"]}
                    yield question(f"{path}: question {asked.get('id', '?')}", fields, "")
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}: article {number}: not as SQuAD has it ({error}); {ACCEPTED} is read"
            ) from None


def question(where: str, fields: Any, number: str, line: int = 0) -> Question:
    """A question from its fields; answers as lists of texts and starts, or of dictionaries.

    Raises:
        InputError: no question or context, or an answer that is not where it says.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(fields).__name__}")
    asked, context = (text_field(where, fields, name) for name in ("question", "context"))
    given = fields.get("answers")
    texts, starts = _answers(where, given)
    if len(texts) != len(starts):
        raise InputError(f"{where}: {len(texts)} answers but {len(starts)} starts (answer_start)")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise InputError(f"{where}: an answer needs a text and answer_start, got {given!r:.80}")
        if context[start : start + len(text)] != text or start < 0:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise InputError(
                f"{where}: the answer {text!r:.60} is not at character {start} of the context, "
                f"where {there!r:.60} is"
            )
    labelled = given is not None or bool(fields.get("is_impossible"))
    name = str(fields.get("id", number))
    return Question(name, asked, context, tuple(texts), tuple(starts), line, labelled)


def _answers(where: str, given: Any) -> tuple[list[Any], list[Any]]:
    """Texts of answers and where they start, nothing of them looked at yet."""
    if given is None:
        return [], []
    if isinstance(given, list) and all(isinstance(answer, dict) for answer in given):
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in given]
        return [text for text, _ in pairs], [start for _, start in pairs]
    if isinstance(given, dict):
        texts, starts = (given.get(name, []) for name in ("text", "answer_start"))
        if isinstance(texts, list) and isinstance(starts, list):
            return texts, starts
    raise InputError(
        f"{where}: answers must be a list of dictionaries with text and answer_start, or a "
        f"dictionary of these two lists, got {given!r:.80}"
    )
