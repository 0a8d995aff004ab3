"""The embedding's kernels as registered operators, and their backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import embedding
from fastbert.kernels.checks import Draw, wants_gradient
from fastbert.kernels.registered import (
    Registered,
    refuse_second_derivative,
    row_contiguous,
)

embedding_fwd = Registered(embedding.embedding_fwd)
embedding_bwd = Registered(embedding.embedding_bwd)


@embedding_fwd.operator.register_fake
def _(word_weight, *rest):  # type: ignore[no-untyped-def]
    tokens, dtype, wants_statistics = rest[4].shape[0], rest[-2], rest[-1]
    statistics = tokens if wants_statistics else 0
    return (
        word_weight.new_empty((tokens, word_weight.shape[1]), dtype=dtype),
        word_weight.new_empty(statistics, dtype=torch.float32),
        word_weight.new_empty(statistics, dtype=torch.float32),
    )


@embedding_bwd.operator.register_fake
def _(dy, word_weight, position_weight, segment_weight, *rest):  # type: ignore[no-untyped-def]
    rows = word_weight.shape[0] + position_weight.shape[0] + segment_weight.shape[0]
    return (
        dy.new_empty((rows, dy.shape[1]), dtype=torch.float32),
        dy.new_empty((2, dy.shape[1]), dtype=torch.float32),
    )


def embedded(
    word_weight: Tensor,
    position_weight: Tensor,
    segment_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ids: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor | None,
    draw: Draw,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """embedding, differentiable; ids are those of words, positions and segments."""
    parameters = (word_weight, position_weight, segment_weight, norm_weight, norm_bias)
    if not wants_gradient(*parameters):
        y, _, _ = embedding_fwd(*parameters, *ids, cu_seqlens, *draw, eps, dtype, False)
        return y  # type: ignore[no-any-return]
    return _Embedding.apply(*parameters, ids, cu_seqlens, draw, eps, dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        word_weight: Tensor,
        position_weight: Tensor,
        segment_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        ids: tuple[Tensor, Tensor, Tensor],
        cu_seqlens: Tensor | None,
        draw: Draw,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        parameters = (word_weight, position_weight, segment_weight, norm_weight, norm_bias)
        y, mean, rstd = embedding_fwd(*parameters, *ids, cu_seqlens, *draw, eps, dtype, True)
        state, sequence_ids, positions, *ctx.scalars = draw
        ctx.save_for_backward(
            *parameters[:4], *ids, cu_seqlens, mean, rstd, state, sequence_ids, positions
        )
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative("embedding")
        dtables, sums = embedding_bwd(row_contiguous(dy), *ctx.saved_tensors, *ctx.scalars)
        sizes = [table.shape[0] for table in ctx.saved_tensors[:3]]
        gradients = [*torch.split(dtables, sizes), sums[0], sums[1]]
        cast = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*cast, None, None, None, None, None)
