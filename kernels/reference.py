"""Every operator in plain PyTorch: the definition, the oracle in fp64, and the path for CPUs.

Signatures are those of ops.py. Statistics, softmax and losses are computed in fp32 or wider.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels.layout import Group, Layout
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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: Layout,
    softmax_scale: float,
    dropout_p: float,
    rng: Rng | None,
) -> Tensor:
    """softmax(scale q k') v within each sequence; zeros in rows of no sequence."""
    return _Attention.apply(query, key, value, layout, softmax_scale, dropout_p, rng)


class _Attention(torch.autograd.Function):
    """Attention by groups of similar length, each one batched product; no [tokens, tokens]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        softmax_scale: float,
        dropout_p: float,
        rng: Rng | None,
    ) -> Tensor:
        output = _blank(query, layout)
        saved = []
        masks = _attention_masks(layout, query, dropout_p, rng)
        for group, mask in zip(layout.groups(), masks, strict=True):
            q, k, v = (_gather(tensor, group) for tensor in (query, key, value))
            probabilities = _probabilities(q, k, group, softmax_scale)
            kept = probabilities if mask is None else probabilities * mask
            _scatter(output, group, kept @ v)
            saved.append(probabilities)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.plan = (layout, softmax_scale, dropout_p, rng)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, *saved = ctx.saved_tensors
        layout, softmax_scale, dropout_p, rng = ctx.plan
        results = [_blank(tensor, layout) for tensor in (query, key, value)]
        masks = _attention_masks(layout, query, dropout_p, rng)
        for group, mask, probabilities in zip(layout.groups(), masks, saved, strict=True):
            q, k, v, grad = (_gather(tensor, group) for tensor in (query, key, value, grads[0]))
            if torch.is_grad_enabled():
                # a second derivative needs the probabilities as a function of q and k
                probabilities = _probabilities(q, k, group, softmax_scale)
            if group.padding is not None:
                grad = grad * (~group.padding).to(grad.dtype)[:, None, :, None]
            kept = probabilities if mask is None else probabilities * mask
            grad_kept = grad @ v.transpose(-1, -2)
            grad_probabilities = grad_kept if mask is None else grad_kept * mask
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            _scatter(results[0], group, grad_scores @ (k * softmax_scale))
            _scatter(results[1], group, grad_scores.transpose(-1, -2) @ (q * softmax_scale))
            _scatter(results[2], group, kept.transpose(-1, -2) @ grad)
        return (*results, None, None, None, None)


def _attention_masks(
    layout: Layout, like: Tensor, dropout_p: float, rng: Rng | None
) -> list[Tensor | None]:
    groups = layout.groups()
    if dropout_p == 0.0:
        return [None] * len(groups)
    assert rng is not None
    shapes = [(g.sequences, like.shape[1], g.length, g.length) for g in groups]
    sizes = [math.prod(shape) for shape in shapes]
    flat = keep_mask((sum(sizes),), dropout_p, rng, like)
    parts = torch.split(flat, sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _probabilities(q: Tensor, k: Tensor, group: Group, softmax_scale: float) -> Tensor:
    scores = (q * softmax_scale) @ k.transpose(-1, -2)
    if group.padding is not None:
        # an addition that broadcasts is several times faster on CPUs than masked_fill
        hidden = torch.zeros(group.padding.shape, dtype=q.dtype, device=q.device)
        hidden.masked_fill_(group.padding, float("-inf"))
        scores = scores + hidden[:, None, None, :]
    return torch.softmax(scores, dim=-1)


def _blank(like: Tensor, layout: Layout) -> Tensor:
    """Room for every row; those of no sequence are zero, the others are about to be written."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    result[layout.num_tokens() :].zero_()
    return result


def _gather(tensor: Tensor, group: Group) -> Tensor:
    """[tokens, heads, head_dim] -> [sequences, heads, length, head_dim]."""
    if group.start is not None:
        rows = tensor.narrow(0, group.start, len(group.index))
    else:
        rows = tensor.index_select(0, group.index)
    return rows.unflatten(0, (group.sequences, group.length)).transpose(1, 2)


def _scatter(target: Tensor, group: Group, block: Tensor) -> None:
    """Write [sequences, heads, length, head_dim] back to the rows it came from."""
    rows = block.transpose(1, 2).flatten(0, 1)
    if group.start is not None:
        target.narrow(0, group.start, len(group.index)).copy_(rows)
        return
    if group.padding is not None:
        rows = rows.index_select(0, group.slots)
    target.index_copy_(0, group.rows, rows)


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
