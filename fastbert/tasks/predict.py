"""Answers for the lines of files or of standard input, by a saved classifier."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

import torch

from fastbert.data.text_files import Line, counted, decoded_lines
from fastbert.errors import InputError
from fastbert.tasks.classifier import Classifier
from fastbert.tasks.classify import classify

# enough to fill batches well, and little enough that answers come soon
LINES_AT_ONCE = 1024
_EMPTY = "is empty; one text a line is wanted"


def predict(
    model: str | os.PathLike[str],
    files: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    out: IO[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write "label TAB probability TAB line" for every line of text.

    Args:
        model: a run of `finetune classify`, or its model folder.
        files: UTF-8, one text a line, plain or .gz; standard input where none is named.
            A classifier of pairs reads "text TAB second text". A blank line is answered by a
            blank line, so that answers and texts stay side by side.
        dtype: of matrix products.
        out: standard output where None.
        say: told of blank lines and cut texts; standard error where None.

    Raises:
        InputError: no classifier, no text, undecodable bytes, or a line that is not a pair where
            pairs are wanted.
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
    classifier = Classifier.from_pretrained(model)
    classifier.model.to("cuda" if torch.cuda.is_available() else "cpu")
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
        while some := list(islice(lines, at_once)):
            answers = answer_lines(classifier, some, name, dtype=dtype, say=say)
            out.write("".join(f"{answer}\n" for answer in answers))
            out.flush()
            texts += sum(map(bool, answers))
            blank += len(answers) - sum(map(bool, answers))
        if texts + blank == before:
            raise InputError(f"{name}: {_EMPTY}")
    if blank:
        say(f"{counted(blank, 'blank line')}: answered by blank lines")


def answer_lines(
    classifier: Classifier,
    lines: Sequence[Line],
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """One answer a line, without line ends; "" for a blank line."""
    asked = [line for line in lines if line.text.strip()]
    texts, seconds = [line.text for line in asked], None
    if classifier.facts.pair:
        pairs = [_pair(line, source) for line in asked]
        texts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    found = classify(
        classifier.model,
        classifier.tokenizer,
        texts,
        seconds,
        max_seq_len=classifier.facts.max_seq_len,
        dtype=dtype,
        say=say,
    )
    best = found.probabilities.max(axis=-1, initial=0.0)
    answers = iter(
        f"{label}\t{share:.4f}\t{line.text}"
        for label, share, line in zip(found.labels, best, asked, strict=True)
    )
    return [next(answers) if line.text.strip() else "" for line in lines]


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


def _pair(line: Line, source: str) -> tuple[str, str]:
    first, tab, second = line.text.partition("\t")
    if not tab or "\t" in second:
        tabs = line.text.count("\t")
        raise InputError(
            f"{source}:{line.number}: this model was trained on pairs: a line must be two texts "
            f"with one tab between them, found {counted(tabs, 'tab')}"
        )
    return first, second


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
