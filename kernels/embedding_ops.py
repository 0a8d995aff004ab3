"""The public embedding operator: checks, autocast and dispatch; ops.py hands it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import launch, reference
from fastbert.kernels.checks import (
    check_dropout,
    check_kernel_inputs,
    check_kernel_width,
    check_shapes,
    compute_dtype,
    draw,
    no_autocast,
)
from fastbert.kernels.layout import Layout
from fastbert.kernels.philox import Rng


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    layout: Layout | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    sparse: bool = False,
) -> Tensor:
    """Word, position and segment rows, summed, normalised, dropped out (Devlin et al. 2018).

    Args:
        input_ids, position_ids, token_type_ids: [tokens] integers.
        word_weight, position_weight, token_type_weight: [rows, hidden_size].
        norm_weight, norm_bias: [hidden_size].
        layout: of the batch; ids and gradients past its last sequence may be anything. None where
            every row counts.
        eps: added to the variance.
        dropout_p: dropout after the norm, in [0, 1).
        rng: names the dropout draw.
        sparse: as torch's embedding has it, the word table's gradient is a sparse tensor of the
            rows that were read; without kernels alone, theirs is always dense.

    Returns:
        [tokens, hidden_size] in the autocast dtype, or else the weights' dtype; rows past the last
        sequence are zero and pass no gradient on.

    Raises:
        ValueError: shapes that do not fit, dropout_p out of range.
    """
    check_dropout("embedding", dropout_p, rng)
    if not input_ids.shape == position_ids.shape == token_type_ids.shape or input_ids.dim() != 1:
        raise ValueError(
            "embedding: input_ids, position_ids and token_type_ids must all be [tokens], got "
            f"{tuple(input_ids.shape)}, {tuple(position_ids.shape)}, {tuple(token_type_ids.shape)}"
        )
    width = word_weight.shape[1]
    check_shapes(
        "embedding",
        ("position_weight", position_weight, (position_weight.shape[0], width)),
        ("token_type_weight", token_type_weight, (token_type_weight.shape[0], width)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
    )
    if layout is not None and layout.capacity != input_ids.shape[0]:
        raise ValueError(
            f"embedding: layout is for {layout.capacity} tokens, got {input_ids.shape[0]}"
        )
    dtype = compute_dtype(word_weight)
    ids = (input_ids, position_ids, token_type_ids)
    tables = (word_weight, position_weight, token_type_weight)
    if launch.uses_triton(word_weight):
        check_kernel_width("embedding", width)
        check_kernel_inputs(
            "embedding",
            word_weight=word_weight,
            position_weight=position_weight,
            token_type_weight=token_type_weight,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
        )
        return _kernels(word_weight).embedded(
            *(table.contiguous() for table in tables),
            norm_weight,
            norm_bias,
            tuple(column.contiguous() for column in ids),
            None if layout is None else layout.cu_seqlens,
            draw("embedding", input_ids, dropout_p, rng),
            eps,
            dtype,
        )
    with no_autocast(word_weight):
        return reference.embedding(
            *ids,
            *tables,
            norm_weight,
            norm_bias,
            num_tokens=None if layout is None else layout.num_tokens(),
            eps=eps,
            dropout_p=dropout_p,
            rng=rng,
            dtype=dtype,
            sparse=sparse,
        )


def _kernels(tensor: Tensor) -> Any:
    if not torch.compiler.is_compiling():
        launch.require_triton(tensor.device.type)
    # where Triton is missing, and on CPUs, none of this is ever imported
    from fastbert.kernels import autograd_embedding

    return autograd_embedding
