"""Every operator in plain PyTorch: the definition, the oracle in fp64, and the path for CPUs.

Signatures are those of ops.py. Statistics, softmax and losses are computed in fp32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels.philox import Rng, keep_mask

# logits held at once by linear_cross_entropy, in elements: 32 MiB of fp32
LOGITS_AT_ONCE = 1 << 23
_GELU = {"gelu": "none", "gelu_new": "tanh"}


def dropout(x: Tensor, dropout_p: float, rng: Rng | None) -> Tensor:
    """Zero elements with probability `dropout_p`, scale the rest (Srivastava et al. 2014)."""
    if dropout_p == 0.0:
        return x
    assert rng is not None
    return x * keep_mask(tuple(x.shape), dropout_p, rng, x)


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
    eps: float,
    dropout_p: float,
    rng: Rng | None,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of the three gathered rows' sum, then dropout."""
    total = F.embedding(input_ids, word_weight)
    total = total + F.embedding(position_ids, position_weight)
    total = total + F.embedding(token_type_ids, token_type_weight)
    normed = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    return dropout(normed.to(dtype), dropout_p, rng)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dropout_p: float,
    rng: Rng | None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + x_bias)) (Ba et al. 2016)."""
    total = _norm_total(x, x_bias, residual, dropout_p, rng)
    return _normalised(total, weight, bias, eps).to(x.dtype)


def layer_norm_with_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dropout_p: float,
    rng: Rng | None,
) -> tuple[Tensor, Tensor]:
    """layer_norm, and the sum it normalises."""
    total = _norm_total(x, x_bias, residual, dropout_p, rng)
    return _normalised(total, weight, bias, eps).to(x.dtype), total.to(x.dtype)


def _norm_total(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, dropout_p: float, rng: Rng | None
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if x_bias is None else x + x_bias.to(wide)
    total = dropout(total, dropout_p, rng)
    return total if residual is None else total + residual


def _normalised(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = total.dtype
    return F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), eps)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, *, activation: str
) -> Tensor:
    """GELU(x w1' + b1) w2' + b2 (Hendrycks and Gimpel 2016)."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=_GELU[activation]), w2, b2)


def gated_feed_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
) -> Tensor:
    """(GELU(a) * g) w2' + b2 with [a | g] = x w1' + b1 (Shazeer 2020)."""
    activated, gate = F.linear(x, w1, b1).chunk(2, dim=-1)
    return F.linear(F.gelu(activated, approximate=_GELU[activation]) * gate, w2, b2)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, *, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of softmax(hidden weight' + bias), and how many labels come top.

    `weight` and `bias` may be wider than `hidden`: products are in the dtype of `hidden`, their
    gradients in their own.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made while a chunk's logits are at hand, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        narrow = hidden.dtype
        decoder, offset = weight.to(narrow), bias.to(narrow)
        ignored = labels == ignore_index
        hidden = hidden.masked_fill(ignored[:, None], 0.0)
        targets = labels.masked_fill(ignored, 0)[:, None]
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias = None, torch.zeros_like(bias)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        at_once = max(1, LOGITS_AT_ONCE // len(weight))
        for first in range(0, len(labels), at_once):
            rows = slice(first, first + at_once)
            target, skip = targets[rows], ignored[rows, None]
            logits = F.linear(hidden[rows], decoder, offset).to(wide)
            logits -= logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, target)
            total = logits.exp_().sum(dim=-1, keepdim=True)
            loss += (total.log() - at_target).masked_fill_(skip, 0.0).sum()
            correct += ((at_target == 0.0) & ~skip).sum()
            if wanted:
                gradient = logits.div_(total)
                gradient.scatter_add_(1, target, torch.full_like(at_target, -1.0))
                gradient.masked_fill_(skip, 0.0)
                grad_bias += gradient.sum(dim=0)
                gradient = gradient.to(narrow)
                grad_hidden[rows] = gradient @ decoder
                product = (gradient.t() @ hidden[rows]).to(weight.dtype)
                # no zeros to fill and add to where one chunk is all
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        ctx.mark_non_differentiable(correct)
        if wanted:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy: has no second derivative; for one, use "
                "torch.nn.functional.cross_entropy on hidden @ weight.T + bias"
            )
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        # a scalar tensor does not change the others' dtype, nor is it rounded to it
        scale = grads[0]
        return grad_hidden * scale, grad_weight * scale, None, grad_bias * scale, None
