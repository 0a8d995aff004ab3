"""The public operators of the masked-LM head: checks, autocast and dispatch; ops.py hands them on.

Losses are summed over the rows that are not ignored, and the count of targets never leaves the
device: a mean is the caller's, who knows the targets of the whole optimiser step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels import reference_cross_entropy as reference
from fastbert.kernels.checks import (
    check_activation,
    check_kernel_inputs,
    check_kernel_width,
    check_shapes,
    compute_dtype,
    no_autocast,
)


class CrossEntropy(NamedTuple):
    """What linear_cross_entropy and masked_lm_loss return.

    Attributes:
        loss_sum: scalar fp32 (fp64 for fp64 inputs), summed over rows that are not ignored.
        correct: scalar int64, rows in which no logit is larger than the label's; a tie, which
            16-bit logits know, counts as right.
    """

    loss_sum: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Softmax cross-entropy of hidden weight' + bias without keeping the logits.

    Args:
        hidden: [rows, hidden_size]; ignored rows may hold anything and get zero gradient.
        weight: [vocab_size, hidden_size]; bias: [vocab_size].
        labels: [rows] int64 in [0, vocab_size), `ignore_index` in rows that do not count.
        ignore_index: no label.
        label_smoothing: share of the target spread over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567), in [0, 1].
        z_loss: weight of the squared log-sum-exp (Chowdhery et al. 2022, arXiv:2204.02311).

    Returns:
        The summed loss and the number of right answers.

    Raises:
        ValueError: shapes that do not fit, numbers out of range.
    """
    operator = "linear_cross_entropy"
    _check_loss(operator, labels, label_smoothing, z_loss)
    vocab_size, hidden_size = weight.shape
    check_shapes(
        operator,
        ("hidden", hidden, (len(labels), hidden_size)),
        ("bias", bias, (vocab_size,)),
    )
    dtype = compute_dtype(hidden)
    if launch.uses_triton(hidden):
        check_kernel_inputs(operator, hidden=hidden, weight=weight, bias=bias)
        with no_autocast(hidden):
            return CrossEntropy(
                *_kernels(hidden).summed_loss(
                    hidden.to(dtype),
                    weight,
                    labels.contiguous(),
                    bias,
                    ignore_index,
                    label_smoothing,
                    z_loss,
                )
            )
    with no_autocast(hidden):
        return CrossEntropy(
            *reference.linear_cross_entropy(
                hidden.to(dtype),
                weight,
                labels,
                bias,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
        )


def masked_lm_loss(
    hidden_states: Tensor,
    masked_positions: Tensor,
    labels: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    *,
    activation: str = "gelu",
    eps: float = 1e-12,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """BERT's masked-LM head from hidden states to loss (Devlin et al. 2018).

    linear_cross_entropy of LayerNorm(GELU(x dense_weight' + dense_bias)), x being the masked rows.

    Args:
        hidden_states: [tokens, hidden_size].
        masked_positions: [masked] int64, rows of `hidden_states`; those of labels that count are
            all different, and the others are not read.
        labels: [masked] int64 in [0, vocab_size), `ignore_index` in unused slots.
        dense_weight: [width, hidden_size]; dense_bias, norm_weight, norm_bias: [width].
        decoder_weight: [vocab_size, width], mostly the word embedding; decoder_bias: [vocab_size].
        activation: "gelu" (exact, erf) or "gelu_new" (tanh).
        eps: added to the variance.
        ignore_index, label_smoothing, z_loss: as for linear_cross_entropy.

    Returns:
        The summed loss and the number of right answers.

    Raises:
        ValueError: shapes that do not fit, numbers out of range, an unknown activation.
    """
    operator = "masked_lm_loss"
    _check_loss(operator, labels, label_smoothing, z_loss)
    check_activation(operator, activation)
    vocab_size, width = decoder_weight.shape
    check_shapes(
        operator,
        ("hidden_states", hidden_states, (len(hidden_states), dense_weight.shape[-1])),
        ("masked_positions", masked_positions, labels.shape),
        ("dense_weight", dense_weight, (width, dense_weight.shape[-1])),
        ("dense_bias", dense_bias, (width,)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("decoder_bias", decoder_bias, (vocab_size,)),
    )
    dtype = compute_dtype(hidden_states)
    if launch.uses_triton(hidden_states):
        check_kernel_width(operator, width)
        check_kernel_inputs(
            operator,
            hidden_states=hidden_states,
            dense_weight=dense_weight,
            dense_bias=dense_bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            decoder_weight=decoder_weight,
            decoder_bias=decoder_bias,
        )
        with no_autocast(hidden_states):
            return CrossEntropy(
                *_kernels(hidden_states).head_loss(
                    hidden_states.to(dtype),
                    masked_positions.contiguous(),
                    labels.contiguous(),
                    dense_weight.to(dtype),
                    dense_bias,
                    norm_weight,
                    norm_bias,
                    decoder_weight,
                    decoder_bias,
                    activation,
                    eps,
                    ignore_index,
                    label_smoothing,
                    z_loss,
                )
            )
    with no_autocast(hidden_states):
        return CrossEntropy(
            *reference.masked_lm_loss(
                hidden_states.to(dtype),
                masked_positions,
                labels,
                dense_weight.to(dtype),
                None if dense_bias is None else dense_bias.to(dtype),
                norm_weight,
                norm_bias,
                decoder_weight,
                decoder_bias,
                activation=activation,
                eps=eps,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
        )


def _check_loss(operator: str, labels: Tensor, label_smoothing: float, z_loss: float) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"{operator}: labels must be [rows] int64, got {list(labels.shape)} {labels.dtype}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{operator}: z_loss must be at least 0 and finite, got {z_loss}")


def _kernels(tensor: Tensor) -> Any:
    if not torch.compiler.is_compiling():
        launch.require_triton(tensor.device.type)
    # where Triton is missing, and on CPUs, none of this is ever imported
    from fastbert.kernels import autograd_masked_lm

    return autograd_masked_lm
