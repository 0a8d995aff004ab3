"""Small models, corpora and batches that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer, train_tokenizer
from fastbert.training.step import Inputs
from fastbert.training.task_step import task_backward

M = TypeVar("M", bound=nn.Module)
WORDS = [
    "river",
    "stone",
    "bridge",
    "lantern",
    "winter",
    "garden",
    "captain",
    "letter",
    "silver",
    "window",
    "mountain",
    "candle",
    "harbour",
    "thunder",
    "meadow",
    "orchard",
    "painter",
    "journey",
    "market",
    "village",
]


def tiny_config(**fields: Any) -> EncoderConfig:
    """Odd sizes throughout, so that nothing fits a block by chance."""
    shape = {
        "vocab_size": 67,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "max_position_embeddings": 160,
        "labels": ["first", "second", "third"],
    }
    return EncoderConfig(**{**shape, **fields})


def stirred(model: M, seed: int = 0) -> M:
    """The model with every parameter moved, so that no bias is zero and no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_examples(
    lengths: Sequence[int],
    *,
    vocab_size: int = 67,
    masked: bool = True,
    classes: int = 2,
    spans: bool = False,
    seed: int = 0,
) -> Examples:
    """Random sequences; two masked positions in each that has two tokens, a class for each.

    Labels of masked positions are below 3, so that they are classes of tokens too.
    """
    rng = np.random.default_rng(seed)
    examples = Examples.from_lists(
        [rng.integers(1, vocab_size, n).tolist() for n in lengths],
        [(np.arange(n) >= n // 2).astype(int).tolist() for n in lengths],
        rng.integers(0, classes, len(lengths)).tolist(),
    )
    if masked:
        starts = examples.cu_seqlens
        positions = [
            np.sort(rng.choice(n, min(n, 2), replace=False)) + start
            for n, start in zip(lengths, starts[:-1], strict=True)
        ]
        examples.masked_positions = np.concatenate([np.zeros(0, dtype=np.int64), *positions])
        examples.labels = rng.integers(0, 3, len(examples.masked_positions))
    if spans:
        places = (np.array(lengths)[:, None] * rng.random((len(lengths), 2))).astype(np.int64)
        examples.span_labels = np.sort(places, axis=1)
    return examples


def task_gradients(task, model, batches, shaping=None, adversarial=0.0) -> None:
    """Leave the gradients of one step in the model."""
    cpu = torch.device("cpu")
    inputs = Inputs.send(batches, None, cpu)
    options = {"shaping": shaping, "adversarial": adversarial}
    task_backward(task, model, inputs, torch.float32, **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, of parameters that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@cache
def tiny_tokenizer() -> Tokenizer:
    """A WordPiece vocabulary of invented prose."""
    return train_tokenizer(tiny_documents(documents=60), 120)


def tiny_documents(documents: int, sentences: int = 12, seed: int = 0) -> list[str]:
    """Prose of common words; every document has its own favourites."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(documents):
        weights = rng.dirichlet(np.full(len(WORDS), 0.5))
        lines = []
        for _ in range(int(rng.integers(1, 2 * sentences))):
            words = rng.choice(WORDS, int(rng.integers(2, 24)), p=weights)
            lines.append(" ".join(words).capitalize() + ".")
        texts.append(" ".join(lines))
    return texts


@cache
def tiny_corpus(documents: int = 40, seed: int = 0) -> TokenizedCorpus:
    """Invented prose as ids."""
    return TokenizedCorpus.build(tiny_documents(documents, seed=seed), tiny_tokenizer())


def random_corpus(documents: int, seed: int = 0, vocab_size: int | None = None) -> TokenizedCorpus:
    """Random ordinary ids in sentences and documents of real text's spread of lengths."""
    rng = np.random.default_rng(seed)
    low, high = 5, vocab_size or tiny_tokenizer().vocab_size
    sizes = np.maximum(rng.lognormal(2.5, 0.9, documents), 1).astype(np.int64)
    lengths = np.clip(rng.lognormal(2.9, 0.6, sizes.sum()), 1, 300).astype(np.int64)
    return TokenizedCorpus(
        ids=rng.integers(low, high, lengths.sum()).astype(np.uint16),
        sentence_starts=np.concatenate([[0], np.cumsum(lengths)]),
        document_starts=np.concatenate([[0], np.cumsum(sizes)]),
    )
