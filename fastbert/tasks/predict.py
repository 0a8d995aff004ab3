"""Answers for the lines of files or of standard input, by a saved model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from fastbert.data.text_files import Line, counted, decoded_lines
from fastbert.errors import InputError
from fastbert.tasks.inference import TOKEN_BUDGET
from fastbert.tasks.records import json_object
from fastbert.tasks.saved import Saved

# enough to fill batches well, and little enough that answers come soon
LINES_AT_ONCE = 1024
_EMPTY = "is empty; one text a line is wanted"


def predict(
    model: str | os.PathLike[str],
    files: Sequence[str] = (),
    *,
    as_json: bool = False,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
    out: IO[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write an answer for every line.

    A line of text is answered by what its task says in one line ("label TAB probability TAB line"
    of a classifier), or by a JSON object where that would not hold it; a line of jsonl always by
    an object.

    Args:
        model: a run of `fastbert finetune`, or its model folder.
        files: UTF-8, one text a line or .jsonl, plain or .gz; standard input where none is named.
            A model of pairs reads "text TAB second text". A blank line is answered by a blank
            line, so that answers and texts stay side by side.
        as_json: answer lines of text by objects too.
        dtype: of matrix products.
        token_budget: tokens a batch.
        out: standard output where None.
        say: told of blank lines and cut texts; standard error where None.

    Raises:
        InputError: no such model, no text, undecodable bytes, or a line that the task cannot read.
    """
    for name in files:
        # a pipe is no regular file, and can be read all the same
        if Path(name).is_dir():
            raise InputError(f"{name}: a folder; a file with one text a line is wanted")
        if not Path(name).exists():
            raise InputError(f"{name}: no such file")
    # Python sets it to None where the shell closed it
    if not files and sys.stdin is None:
        raise InputError(f"standard input: {_EMPTY}")
    saved = Saved.from_pretrained(model, "cuda" if torch.cuda.is_available() else "cpu")
    out = out or sys.stdout
    say = say or _to_standard_error
    if files:
        sources = [(name, decoded_lines(Path(name))) for name in files]
    else:
        sources = [("standard input", standard_input_lines(sys.stdin.buffer))]
    texts = blank = 0
    for name, lines in sources:
        at_once = 1 if not files and sys.stdin.isatty() else LINES_AT_ONCE
        before = texts + blank
        jsonl, lines = _is_jsonl(name, lines)
        with tqdm(unit=" lines", desc=name, disable=not sys.stderr.isatty() or at_once == 1) as bar:
            while some := list(islice(lines, at_once)):
                asked = [line for line in some if line.text.strip()]
                answers = iter(
                    answer_lines(
                        saved,
                        asked,
                        name,
                        jsonl=jsonl,
                        as_json=as_json,
                        dtype=dtype,
                        token_budget=token_budget,
                        say=say,
                    )
                )
                whole = [next(answers) if line.text.strip() else "" for line in some]
                out.write("".join(f"{answer}\n" for answer in whole))
                out.flush()
                bar.update(len(some))
                texts += len(asked)
                blank += len(some) - len(asked)
        if texts + blank == before:
            raise InputError(f"{name}: {_EMPTY}")
    if blank:
        say(f"{counted(blank, 'blank line')}: answered by blank lines")


def answer_lines(
    saved: Saved,
    lines: Sequence[Line],
    source: str,
    *,
    jsonl: bool,
    as_json: bool,
    dtype: torch.dtype,
    token_budget: int,
    say: Callable[[str], None],
) -> list[str]:
    """One answer a line, without line ends; lines that are not blank."""
    places = [f"{source}:{line.number}" for line in lines]
    inputs: list[Any] = [
        json_object(line.text, place) if jsonl else saved.task.from_line(line.text, place)
        for line, place in zip(lines, places, strict=True)
    ]
    answers = saved.ask(inputs, places=places, dtype=dtype, token_budget=token_budget, say=say)
    written = []
    for line, given, answer in zip(lines, inputs, answers, strict=True):
        plain = None if as_json or jsonl else saved.task.plain(answer, line.text)
        whole = {**given, **answer} if jsonl else answer
        written.append(plain if plain is not None else json.dumps(whole, ensure_ascii=False))
    return written


def _is_jsonl(name: str, lines: Iterator[Line]) -> tuple[bool, Iterator[Line]]:
    """By the file's name, or by its first line where it has none."""
    if name.lower().endswith((".jsonl", ".jsonl.gz")):
        return True, lines
    first = list(islice(lines, 1))
    try:
        is_object = bool(first) and isinstance(json.loads(first[0].text), dict)
    except (ValueError, RecursionError):
        is_object = False
    return is_object, chain(first, lines)


def standard_input_lines(stream: IO[bytes]) -> Iterator[Line]:
    """Lines of a byte stream, decoded.

    Raises:
        InputError: bytes that are not UTF-8.
    """
    offset = 0
    for number, raw in enumerate(stream, 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"standard input: line {number}, byte {offset + error.start}: not UTF-8"
            ) from None
        offset += len(raw)
        yield Line((text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n"), number)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
