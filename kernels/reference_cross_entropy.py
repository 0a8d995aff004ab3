"""The masked-LM loss in plain PyTorch: the definition, the oracle in fp64, and the path for CPUs.

Of a row with logits x, target y and vocabulary V, with label smoothing e and z-loss weight z:

    lse = log sum_v exp(x_v)
    loss = lse - (1 - e) x_y - e mean_v x_v + z lse^2
    dloss/dx_v = softmax_v (1 + 2 z lse) - (1 - e) [v = y] - e / V

(Szegedy et al. 2016, arXiv:1512.00567; Chowdhery et al. 2022, arXiv:2204.02311.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.products import input_gradient, linear, linear_gelu, weight_gradient

# logits held at once, in elements: 32 MiB of fp32
LOGITS_AT_ONCE = 1 << 23
# of these, what is turned into its gradient at a time on a CPU: a piece stays in a core's cache,
# where the passes over it cost a fraction of what they cost in memory
PIECE = 1 << 18


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of softmax(hidden weight' + bias), and how many labels come top.

    `weight` and `bias` may be wider than `hidden`: products are in the dtype of `hidden`, their
    gradients in their own.
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, bias, ignore_index, label_smoothing, z_loss
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
    activation: str,
    eps: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """linear_cross_entropy of LayerNorm(GELU(dense)) of the masked rows (Devlin et al. 2018)."""
    rows = hidden_states.index_select(0, masked_positions)
    # a row nobody asked for may hold anything
    rows = rows.masked_fill((labels == ignore_index)[:, None], 0.0)
    activated = linear_gelu(rows, dense_weight, dense_bias, activation)
    normed = reference.layer_norm(
        activated,
        norm_weight,
        norm_bias,
        x_bias=None,
        residual=None,
        eps=eps,
        dropout_p=0.0,
        rng=None,
    )
    return linear_cross_entropy(
        normed,
        decoder_weight,
        labels,
        decoder_bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def may_be_read(tensor: Tensor) -> bool:
    """Whether the host reads its numbers without waiting for a device."""
    return tensor.device.type == "cpu"


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made while a chunk's logits are at hand, so that no logits are kept."""

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
        decoder, offset = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        ignored = labels == ignore_index
        hidden = hidden.masked_fill(ignored[:, None], 0.0)
        targets = labels.masked_fill(ignored, 0)[:, None]
        wanted = any(ctx.needs_input_grad)
        sums = _Sums.of(hidden, bias)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, gradient = None, None
        at_once = max(1, LOGITS_AT_ONCE // len(weight))
        # where the loss's own gradient can be asked for without waiting
        later = may_be_read(hidden) and len(labels) <= at_once
        for first in range(0, len(labels), at_once):
            rows = slice(first, first + at_once)
            logits = linear(hidden[rows], decoder, offset)
            extras = (label_smoothing, z_loss, wanted)
            sums.add(logits, targets[rows], ignored[rows, None], *extras)
            if wanted:
                gradient = logits
                grad_hidden[rows] = input_gradient(gradient, decoder)
            if wanted and not later:
                product = weight_gradient(logits, hidden[rows]).to(weight.dtype)
                # no zeros to fill and add to where one chunk is all
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        ctx.mark_non_differentiable(sums.correct)
        if wanted:
            parts = (hidden, gradient) if later else (None, None)
            ctx.save_for_backward(weight, grad_hidden, grad_weight, sums.grad_bias, *parts)
            ctx.bias_dtype = None if bias is None else bias.dtype
        return sums.loss, sums.correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy: has no second derivative; for one, use "
                "torch.nn.functional.cross_entropy on hidden @ weight.T + bias"
            )
        weight, grad_hidden, grad_weight, grad_bias, hidden, gradient = ctx.saved_tensors
        # a scalar tensor does not change the others' dtype, nor is it rounded to it
        scale = grads[0]
        if not ctx.needs_input_grad[1]:
            grad_weight = None
        elif grad_weight is not None:
            grad_weight = grad_weight * scale
        elif gradient is None:
            grad_weight = torch.zeros_like(weight)
        else:
            # the vocabulary's gradient is large: it is made with its scale, not scaled once made
            product = weight_gradient(gradient, hidden, scale.item())
            grad_weight = product.to(weight.dtype)
        grad_bias = None if grad_bias is None else (grad_bias * scale).to(ctx.bias_dtype)
        return grad_hidden * scale, grad_weight, None, grad_bias, None, None, None


@dataclass
class _Sums:
    """Over the rows so far."""

    loss: Tensor
    correct: Tensor
    grad_bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, bias: Tensor | None) -> _Sums:
        wide, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device
        return cls(
            torch.zeros((), dtype=wide, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            None if bias is None else torch.zeros_like(bias, dtype=wide),
        )

    def add(
        self,
        logits: Tensor,
        target: Tensor,
        skip: Tensor,
        label_smoothing: float,
        z_loss: float,
        wanted: bool,
    ) -> None:
        """Count these rows; where wanted, `logits` become their own gradient."""
        on_cpu = logits.device.type == "cpu"
        size = max(1, PIECE // logits.shape[1]) if on_cpu else max(1, len(logits))
        for first in range(0, len(logits), size):
            rows = slice(first, first + size)
            part = logits[rows].to(self.loss.dtype)
            skipped = skip[rows]
            losses, hits = _losses_and_gradient(
                part, target[rows], skipped, label_smoothing, z_loss, wanted
            )
            self.loss += losses.masked_fill_(skipped, 0.0).sum()
            self.correct += (hits & ~skipped).sum()
            if wanted and self.grad_bias is not None:
                self.grad_bias += part.sum(dim=0)
            if wanted and part.dtype != logits.dtype:
                logits[rows] = part


def _losses_and_gradient(
    logits: Tensor,
    target: Tensor,
    skip: Tensor,
    label_smoothing: float,
    z_loss: float,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Each row's loss and whether it is right, [rows, 1]; `logits` become their own gradient.

    The gradient of rows to skip is zero; their loss means nothing.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    logits -= largest
    at_target = logits.gather(1, target)
    mean = logits.mean(dim=-1, keepdim=True) if label_smoothing else None
    total = logits.exp_().sum(dim=-1, keepdim=True)
    # of the shifted logits
    lse = total.log()
    losses = lse - (1.0 - label_smoothing) * at_target
    if mean is not None:
        losses -= label_smoothing * mean
    if z_loss:
        lse = lse + largest
        losses += z_loss * lse.square()
        total = total / (1.0 + 2.0 * z_loss * lse)
    if wanted:
        # zeros without a pass of their own
        gradient = logits.div_(total.masked_fill(skip, math.inf))
        counts = (~skip).to(logits.dtype)
        if label_smoothing:
            gradient -= counts * (label_smoothing / gradient.shape[1])
        gradient.scatter_add_(1, target, counts * (label_smoothing - 1.0))
    return losses, at_target == 0.0
