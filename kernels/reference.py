"""Every operator in plain PyTorch: the definition, the oracle in fp64, and the path for CPUs.

Signatures are those of ops.py. Statistics, softmax and losses are computed in fp32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastbert.kernels.checks import wants_gradient
from fastbert.kernels.philox import Rng, drawn_on_host, keep_mask, keep_scale, kept
from fastbert.kernels.products import GELU, linear, linear_gelu

NARROW = (torch.bfloat16, torch.float16)


def dropout(x: Tensor, dropout_p: float, rng: Rng | None) -> Tensor:
    """Zero elements with probability `dropout_p`, scale the rest (Srivastava et al. 2014)."""
    if dropout_p == 0.0:
        return x
    assert rng is not None
    # the scale is none that 16 bits hold: it is applied before the result is rounded
    if x.dtype in NARROW and drawn_on_host(rng, x):
        return (x * kept(tuple(x.shape), dropout_p, rng, x)).mul_(keep_scale(dropout_p))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * keep_mask(tuple(x.shape), dropout_p, rng, wide)).to(x.dtype)


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
    num_tokens: int | None,
    eps: float,
    dropout_p: float,
    rng: Rng | None,
    dtype: torch.dtype,
    sparse: bool,
) -> Tensor:
    """LayerNorm of the three gathered rows' sum, then dropout; zeros past `num_tokens` rows."""
    tail = 0 if num_tokens is None else input_ids.shape[0] - num_tokens
    if tail:
        input_ids, position_ids, token_type_ids = (
            ids[:num_tokens] for ids in (input_ids, position_ids, token_type_ids)
        )
        rng = rng and rng.first(num_tokens)
    # in place: no gradient needs the parts, and on CPUs fresh memory costs more than the sum
    total = F.embedding(input_ids, word_weight, sparse=sparse)
    total += F.embedding(position_ids, position_weight)
    total += F.embedding(token_type_ids, token_type_weight)
    normed = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    output = dropout(normed, dropout_p, rng).to(dtype)
    return F.pad(output, (0, 0, 0, tail)) if tail else output


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
    if _sums_in_16_bits(x, x_bias, residual) and dropout_p == 0.0:
        return x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if x_bias is None else x + x_bias.to(wide)
    total = dropout(total, dropout_p, rng)
    if residual is None:
        return total
    # in place where it is nobody else's: on CPUs fresh memory costs more than the sum
    return total + residual if total is x else total.add_(residual)


def _sums_in_16_bits(x: Tensor, x_bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether a sum is rounded before its norm, as torch's modules do: inference on CPUs, where
    wide copies cost more than the norm. Over training steps gradients would show it, and fp16 knows
    no sum beyond 65,504."""
    narrow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x_bias is None
    # forward-mode derivatives of torch's norm are in the parameters' dtype
    return narrow and not wants_gradient(x, residual) and forward_ad._current_level < 0  # type: ignore


def _normalised(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(total.dtype, torch.float32)
    return F.layer_norm(total, weight.shape, weight.to(wide), bias.to(wide), eps)


def feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, *, activation: str
) -> Tensor:
    """GELU(x w1' + b1) w2' + b2 (Hendrycks and Gimpel 2016)."""
    return linear(linear_gelu(x, w1, b1, activation), w2, b2)


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
    activated, gate = linear(x, w1, b1).chunk(2, dim=-1)
    return linear(F.gelu(activated, approximate=GELU[activation]) * gate, w2, b2)
