"""The launches of embedding and masked-LM head that ship, for the compile matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.bench.compile_matrix import Case

WIDTHS = (32, 128, 384, 768, 1024, 1000, 2048, 4096, 8192)
# rows that are only copied
COPIED_WIDTHS = (32, 768, 1000, 8192)
VOCABULARIES = (1000, 21128, 30522, 50368, 119547)
BASE, BASE_VOCABULARY = 768, 30522
TOKENS, MASKED, POSITIONS, SEQUENCES = 16384, 2458, 512, 128
DROPOUT = 0.1


def cases() -> list[Case]:
    """Every kernel of the two in every variant; the quick ones are marked."""
    found = []
    for width in WIDTHS:
        for variant in ("dropout", "bare") if width == BASE else ("dropout",):
            quick = width == BASE and variant == "dropout"
            forward, backward = _embedding_fwd(width, variant), _embedding_bwd(width, variant)
            found.append(Case("embedding_fwd", variant, width, forward, quick))
            found.append(Case("embedding_bwd", variant, width, backward, quick))
    for width in COPIED_WIDTHS:
        found.append(Case("gather_rows", "all", width, _gather(width), width == BASE))
        found.append(Case("scatter_rows", "all", width, _scatter(width), width == BASE))
    for vocab_size in VOCABULARIES:
        quick = vocab_size == BASE_VOCABULARY
        for variant in ("plain", "extras", "forward") if quick else ("plain",):
            call = _cross_entropy(vocab_size, variant)
            found.append(
                Case("cross_entropy", variant, vocab_size, call, quick and variant == "plain")
            )
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _draw(variant: str) -> tuple[Any, ...]:
    if variant == "bare":
        return None, None, None, 0, 0, 0.0
    ids = _meta(TOKENS, dtype=torch.int32)
    return _meta(3, dtype=torch.int64), ids, ids, 1, 0, DROPOUT


def _tables(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_meta(rows, width, dtype=dtype) for rows in (BASE_VOCABULARY, POSITIONS, 2))


def _columns(variant: str) -> tuple[Tensor | None, ...]:
    ids = _meta(TOKENS, dtype=torch.int64)
    bounds = None if variant == "bare" else _meta(SEQUENCES + 1, dtype=torch.int32)
    return ids, ids, ids, bounds


def _embedding_fwd(width: int, variant: str) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.embedding import embedding_fwd

        norm = (_meta(width), _meta(width))
        rest = (*_columns(variant), *_draw(variant), 1e-12, dtype, variant != "bare")
        embedding_fwd(*_tables(width, dtype), *norm, *rest)  # type: ignore[arg-type, call-arg]

    return call


def _embedding_bwd(width: int, variant: str) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.embedding import embedding_bwd

        statistics = (_meta(TOKENS), _meta(TOKENS))
        rest = (_meta(width), *_columns(variant), *statistics, *_draw(variant))
        dy = _meta(TOKENS, width, dtype=dtype)
        embedding_bwd(dy, *_tables(width, dtype), *rest)  # type: ignore[arg-type, call-arg]

    return call


def _slots() -> tuple[Tensor, Tensor]:
    ids = _meta(MASKED, dtype=torch.int64)
    return ids, ids


def _gather(width: int) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.masked_lm import gather_rows

        gather_rows(_meta(TOKENS, width, dtype=dtype), *_slots(), -100)

    return call


def _scatter(width: int) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.masked_lm import scatter_rows

        scatter_rows(_meta(MASKED, width, dtype=dtype), *_slots(), -100, TOKENS)

    return call


def _cross_entropy(vocab_size: int, variant: str) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.masked_lm import linear_cross_entropy

        hidden = _meta(MASKED, BASE, dtype=dtype)
        weight, bias = _meta(vocab_size, BASE), _meta(vocab_size)
        smoothing, z_loss = (0.1, 1e-4) if variant == "extras" else (0.0, 0.0)
        labels = _meta(MASKED, dtype=torch.int64)
        linear_cross_entropy(
            hidden, weight, labels, bias, -100, smoothing, z_loss, variant != "forward"
        )

    return call
