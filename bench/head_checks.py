"""What `fastbert validate` asks of embedding and masked-LM head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import ops
from fastbert.kernels.ops import Layout, Rng

Inputs = dict[str, Tensor]
# operator, variant, shape, call, make: what a check is made of
Parts = tuple[str, str, tuple[int, ...], Callable[..., Any], Callable[[torch.Generator], Inputs]]

IGNORED = -100
EXTRAS = {"label_smoothing": 0.1, "z_loss": 1e-3}
# rows, width, vocabulary
HEADS = ((0, 64, 101), (1, 64, 101), (17, 128, 1000), (129, 384, 21128), (513, 768, 30522),
         (2458, 768, 30522), (129, 128, 50368), (129, 128, 119547), (4097, 64, 30522))  # fmt: skip
SMALL_HEADS = ((0, 40, 67), (17, 40, 67))
# tokens, width
EMBEDDINGS = ((0, 64), (1, 128), (17, 33), (129, 384), (513, 768), (4096, 768), (4096, 1000))
SMALL_EMBEDDINGS = ((0, 40), (17, 40))
WORDS, POSITIONS, SEGMENTS = 97, 61, 2


def checks(*, small: bool) -> Iterator[Parts]:
    """Every variant over the shape classes; `small` for the interpreter."""
    for shape in SMALL_HEADS if small else HEADS:
        yield from head_checks(*shape)
    for sizes in SMALL_EMBEDDINGS if small else EMBEDDINGS:
        yield from embedding_checks(*sizes)


def head_checks(rows: int, width: int, vocab_size: int) -> Iterator[Parts]:
    """The loss alone, with and without extras, and the head with masked rows out of order."""
    shape, tokens = (rows, width, vocab_size), 2 * rows + 1
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[::3] = IGNORED
    positions = torch.randperm(tokens, generator=generator)[:rows]

    def make(generator: torch.Generator) -> Inputs:
        return {
            "hidden": _normal(generator, rows, width),
            "weight": _normal(generator, vocab_size, width) * width**-0.5,
            "bias": _normal(generator, vocab_size),
        }

    def make_head(generator: torch.Generator) -> Inputs:
        return {
            "hidden_states": _normal(generator, tokens, width),
            "dense_weight": _normal(generator, width, width) * width**-0.5,
            "dense_bias": _normal(generator, width),
            "norm_weight": 1 + _normal(generator, width) / 8,
            "norm_bias": _normal(generator, width),
            "decoder_weight": _normal(generator, vocab_size, width) * width**-0.5,
            "decoder_bias": _normal(generator, vocab_size),
        }

    def loss(options: dict[str, Any]) -> Callable[..., Tensor]:
        def call(**tensors: Any) -> Tensor:
            device = tensors["hidden"].device
            return ops.linear_cross_entropy(
                labels=labels.to(device),
                **tensors,
                **options,
            ).loss_sum

        return call

    def head(**tensors: Any) -> Tensor:
        device = tensors["hidden_states"].device
        return ops.masked_lm_loss(
            masked_positions=positions.to(device), labels=labels.to(device), **tensors
        ).loss_sum

    yield "linear_cross_entropy", "plain", shape, loss({}), make
    yield "linear_cross_entropy", "extras", shape, loss(EXTRAS), make
    yield "masked_lm_loss", "head", shape, head, make_head


def embedding_checks(tokens: int, width: int) -> Iterator[Parts]:
    """Mixed words and one word everywhere, with dropout and a tail."""
    generator = torch.Generator().manual_seed(tokens)
    words = torch.randint(0, WORDS, (tokens,), generator=generator)
    places = torch.arange(tokens) % POSITIONS
    segments = torch.arange(tokens) % 7 // 4
    real = tokens - tokens // 9

    def make(generator: torch.Generator) -> Inputs:
        return {
            "word_weight": _normal(generator, WORDS, width),
            "position_weight": _normal(generator, POSITIONS, width),
            "token_type_weight": _normal(generator, SEGMENTS, width),
            "norm_weight": 1 + _normal(generator, width) / 8,
            "norm_bias": _normal(generator, width),
        }

    def embedded(ids: Tensor) -> Callable[..., Tensor]:
        def call(**tensors: Any) -> Tensor:
            device = tensors["word_weight"].device
            bounds = torch.tensor([0, real], dtype=torch.int32, device=device)
            return ops.embedding(
                ids.to(device),
                places.to(device),
                segments.to(device),
                **tensors,
                layout=Layout(bounds, tokens, tokens),
                dropout_p=0.1,
                rng=Rng(seed=1, step=2, exact=True),
            )

        return call

    yield "embedding", "mixed words", (tokens, width), embedded(words), make
    yield "embedding", "one word", (tokens, width), embedded(words * 0 + 5), make


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
