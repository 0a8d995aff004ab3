"""The masked-LM head's kernels as registered operators, and their backward passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import masked_lm
from fastbert.kernels.autograd import (
    bias_activation_bwd,
    bias_activation_fwd,
    layer_norm_bwd,
    layer_norm_fwd,
)
from fastbert.kernels.checks import NO_DRAW, wants_gradient
from fastbert.kernels.registered import Registered, refuse_second_derivative

gather_rows = Registered(masked_lm.gather_rows)
scatter_rows = Registered(masked_lm.scatter_rows)
linear_cross_entropy = Registered(masked_lm.linear_cross_entropy)


@gather_rows.operator.register_fake
def _(source, positions, labels, ignore_index):  # type: ignore[no-untyped-def]
    return source.new_empty((labels.shape[0], source.shape[1]))


@scatter_rows.operator.register_fake
def _(rows, positions, labels, ignore_index, tokens):  # type: ignore[no-untyped-def]
    return rows.new_empty((tokens, rows.shape[1]))


@linear_cross_entropy.operator.register_fake
def _(hidden, weight, labels, bias, *rest):  # type: ignore[no-untyped-def]
    rows, width = hidden.shape
    vocab_size, wanted = weight.shape[0], rest[-1]
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int64),
        hidden.new_empty((rows if wanted else 0, width)),
        weight.new_empty((vocab_size if wanted else 0, width)),
        hidden.new_empty(vocab_size if wanted and bias is not None else 0, dtype=torch.float32),
    )


def summed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """linear_cross_entropy, differentiable."""
    extras = (ignore_index, label_smoothing, z_loss)
    if not wants_gradient(hidden, weight, bias):
        loss, correct, *_ = linear_cross_entropy(
            _without_ignored(hidden, labels, ignore_index), weight, labels, bias, *extras, False
        )
        return loss, correct
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, *extras)


def head_loss(
    hidden_states: Tensor,
    masked_positions: Tensor,
    labels: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    activation: str,
    eps: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """masked_lm_loss, differentiable; hidden states and dense weight in one dtype."""
    parameters = (
        dense_weight, dense_bias, norm_weight, norm_bias, decoder_weight, decoder_bias
    )  # fmt: skip
    extras = (ignore_index, label_smoothing, z_loss)
    if not wants_gradient(hidden_states, *parameters):
        rows = gather_rows(hidden_states, masked_positions, labels, ignore_index)
        normed, *_ = _transformed(rows, *parameters[:4], activation, eps, False)
        loss, correct, *_ = linear_cross_entropy(
            normed, decoder_weight, labels, decoder_bias, *extras, False
        )
        return loss, correct
    return _MaskedLM.apply(
        hidden_states, masked_positions, labels, *parameters, activation, eps, extras
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        loss, correct, dhidden, dweight, dbias = linear_cross_entropy(
            _without_ignored(hidden, labels, ignore_index),
            weight,
            labels,
            bias,
            ignore_index,
            label_smoothing,
            z_loss,
            True,
        )
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> Any:
        refuse_second_derivative("linear_cross_entropy")
        dhidden, dweight, dbias = ctx.saved_tensors
        # a scalar tensor does not change the others' dtype, nor is it rounded to it
        dbias = None if ctx.bias_dtype is None else (dbias * dloss).to(ctx.bias_dtype)
        return dhidden * dloss, dweight * dloss, None, dbias, None, None, None


class _MaskedLM(torch.autograd.Function):
    """Saves the masked rows, their pre-activation and the gradient at the norm's output."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        masked_positions: Tensor,
        labels: Tensor,
        dense_weight: Tensor,
        dense_bias: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        decoder_weight: Tensor,
        decoder_bias: Tensor | None,
        activation: str,
        eps: float,
        extras: tuple[int, float, float],
    ) -> tuple[Tensor, Tensor]:
        rows = gather_rows(hidden_states, masked_positions, labels, extras[0])
        normed, pre, mean, rstd = _transformed(
            rows, dense_weight, dense_bias, norm_weight, norm_bias, activation, eps, True
        )
        loss, correct, dnormed, ddecoder, doffset = linear_cross_entropy(
            normed, decoder_weight, labels, decoder_bias, *extras, True
        )
        ctx.save_for_backward(
            masked_positions, labels, rows, dense_weight, dense_bias, norm_weight,
            pre, mean, rstd, dnormed, ddecoder, doffset,
        )  # fmt: skip
        ctx.plan = (
            activation,
            extras[0],
            hidden_states.shape[0],
            norm_bias.dtype,
            None if decoder_bias is None else decoder_bias.dtype,
        )
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> Any:
        refuse_second_derivative("masked_lm_loss")
        (
            masked_positions, labels, rows, dense_weight, dense_bias, norm_weight,
            pre, mean, rstd, dnormed, ddecoder, doffset,
        ) = ctx.saved_tensors  # fmt: skip
        activation, ignore_index, tokens, norm_bias_dtype, decoder_bias_dtype = ctx.plan
        dtype = rows.dtype
        activated = bias_activation_fwd(pre, dense_bias, activation, False)
        dactivated, _, sums = layer_norm_bwd(
            dnormed * dloss, None, activated, None, None, norm_weight, mean, rstd, *NO_DRAW,
            False, False, dtype, None,
        )  # fmt: skip
        dpre, _, ddense_bias = bias_activation_bwd(dactivated, pre, dense_bias, activation, False)
        needs = ctx.needs_input_grad
        dhidden_states = None
        if needs[0]:
            dhidden_states = scatter_rows(
                dpre @ dense_weight, masked_positions, labels, ignore_index, tokens
            )
        return (
            dhidden_states,
            None,
            None,
            dpre.t() @ rows if needs[3] else None,
            None if dense_bias is None else ddense_bias.to(dense_bias.dtype),
            sums[0].to(norm_weight.dtype),
            sums[1].to(norm_bias_dtype),
            ddecoder * dloss if needs[7] else None,
            None if decoder_bias_dtype is None else (doffset * dloss).to(decoder_bias_dtype),
            None,
            None,
            None,
        )


def _transformed(
    rows: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    activation: str,
    eps: float,
    wants_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm's output, the pre-activation, and the norm's statistics."""
    pre = F.linear(rows, dense_weight)
    activated = bias_activation_fwd(pre, dense_bias, activation, False)
    normed, _, mean, rstd = layer_norm_fwd(
        activated, None, None, norm_weight, norm_bias, *NO_DRAW, eps, rows.dtype, False,
        wants_statistics,
    )  # fmt: skip
    return normed, pre, mean, rstd


def _without_ignored(hidden: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    # a gradient of zero times what an ignored row holds may be NaN
    return hidden.masked_fill((labels == ignore_index)[:, None], 0.0)
