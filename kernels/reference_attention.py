"""Attention and rotary positions in plain PyTorch: the definition, the oracle in fp64, and the path
for CPUs.

No [tokens, tokens] exists: sequences are computed in the blocks of groups.py. Signatures are those
of attention_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.kernels.groups import Group
from fastbert.kernels.layout import Layout
from fastbert.kernels.philox import Rng, keep_masks, score_mask, score_words
from fastbert.kernels.products import has_bf16_products

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Plan(NamedTuple):
    """What attention computes besides its tensors."""

    layout: Layout
    softmax_scale: float
    dropout_p: float = 0.0
    rng: Rng | None = None
    window: tuple[int, int] | None = None
    alibi_slopes: Tensor | None = None
    wants_lse: bool = False


def attend(plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scale q k' + bias) v within each sequence, and its log-sum-exp [heads, tokens].

    Takes query, key and value, or one projection [tokens, 3, heads, head_dim], whose gradient is
    one tensor too. Rows of no sequence are zero, and -inf in the log-sum-exp, which is empty where
    not wanted.
    """
    return _Attention.apply(plan, *tensors)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Queries and keys turned by their position's angles, values as they are (Su et al. 2021)."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    angles = positions.long()
    c, s = (table.to(wide)[angles][:, None, None, :] for table in (cos, sin))
    first, second = qkv[:, :2].to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    return torch.cat([turned.to(qkv.dtype), qkv[:, 2:]], dim=1)


class _Attention(torch.autograd.Function):
    """Takes the fused projection, or query, key and value; gradients come as the inputs came."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = _parts(tensors)
        layout = plan.layout
        output = _blank(query, layout)
        tokens, heads, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((tokens if plan.wants_lse else 0, heads, 1), -math.inf, dtype=wide)
        saved = []
        groups = layout.groups(query.dtype)
        fuses = _fuses(plan, query)
        for group, mask in zip(groups, _attention_masks(plan, query), strict=True):
            q, k, v = (_gather(tensor, group) for tensor in (query, key, value))
            if fuses:
                block, sums = _FUSED(q, k, v, 0.0, False, scale=plan.softmax_scale)
                _scatter(output, group, block)
                saved.append(sums)
                continue
            scores = _scores(q, k, group, plan)
            probabilities = torch.softmax(scores, dim=-1)
            kept = _masked(probabilities, mask)
            _scatter(output, group, kept @ v)
            if plan.wants_lse:
                _scatter(lse, group, torch.logsumexp(scores.to(wide), dim=-1, keepdim=True))
            saved.append(probabilities)
        ctx.save_for_backward(*tensors, output if fuses else None, *saved)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        lse = lse.squeeze(-1).t().contiguous()
        if not plan.wants_lse:
            ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> Any:
        plan = ctx.plan
        layout = plan.layout
        # recomputation hands saved tensors out once
        held = ctx.saved_tensors
        groups = layout.groups(held[0].dtype)
        tensors, output, saved = _split(held, len(groups))
        query, key, value = _parts(tensors)
        if grad_output is None:
            grad_output = torch.zeros_like(query)
        # a second derivative needs the probabilities as a function of q and k
        twice = torch.is_grad_enabled()
        # and gradients that are written to one by one
        results = [_blank(tensor, layout) for tensor in ((query, key, value) if twice else tensors)]
        gradients = results if twice else _parts(results)
        fuses = _fuses(plan, query) and not twice
        for group, mask, kept in zip(groups, _attention_masks(plan, query), saved, strict=True):
            q, k, v, grad = (_gather(tensor, group) for tensor in (query, key, value, grad_output))
            if fuses:
                arguments = (grad, q, k, v, _gather(output, group), kept, 0.0, False)
                blocks = _FUSED_BACKWARD(*arguments, scale=plan.softmax_scale)
            else:
                probabilities = torch.softmax(_scores(q, k, group, plan), dim=-1) if twice else kept
                flowing = None if grad_lse is None else _gather(grad_lse.t().unsqueeze(-1), group)
                blocks = _block_gradients(plan, group, mask, probabilities, q, k, v, grad, flowing)
            for gradient, block in zip(gradients, blocks, strict=True):
                _scatter(gradient, group, block)
        if twice and len(tensors) == 1:
            results = [torch.stack(results, dim=1)]
        return (None, *results)


def _block_gradients(
    plan: Plan,
    group: Group,
    mask: Tensor | None,
    probabilities: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's query, key and value."""
    grad = _without_padding(grad, group)
    kept = _masked(probabilities, mask)
    grad_probabilities = _masked(grad @ v.transpose(-1, -2), mask)
    grad_scores = torch.ops.aten._softmax_backward_data(
        grad_probabilities, probabilities, -1, probabilities.dtype
    )
    if grad_lse is not None:
        flowing = _without_padding(grad_lse, group).to(probabilities.dtype)
        grad_scores = grad_scores + probabilities * flowing
    return (
        grad_scores @ (k * plan.softmax_scale),
        grad_scores.transpose(-1, -2) @ (q * plan.softmax_scale),
        kept.transpose(-1, -2) @ grad,
    )


def _fuses(plan: Plan, query: Tensor) -> bool:
    """Whether torch's fused attention for CPUs computes what the plan asks for.

    It keeps no scores, and beats three operators in fp32; in 16 bits it is several times slower.
    """
    return (
        query.dtype == torch.float32
        and query.device.type == "cpu"
        and plan.dropout_p == 0.0
        and plan.window is None
        and plan.alibi_slopes is None
        and not plan.wants_lse
    )


def _parts(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Query, key and value; of one fused tensor by selection, which may be written to."""
    return list(tensors) if len(tensors) == 3 else [tensors[0].select(1, i) for i in range(3)]


def _split(
    saved: tuple[Tensor, ...], groups: int
) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
    inputs = len(saved) - groups - 1
    return list(saved[:inputs]), saved[inputs], saved[inputs + 1 :]


def _attention_masks(plan: Plan, like: Tensor) -> Iterator[Tensor | None]:
    """Each group's dropout mask, [sequences, heads, length, length], made when it is asked for."""
    groups, rng = plan.layout.groups(like.dtype), plan.rng
    tokens, heads, _ = like.shape
    if plan.dropout_p == 0.0:
        yield from [None] * len(groups)
        return
    assert rng is not None
    if rng.exact or like.is_cuda:
        as_query, as_key = score_words(rng, tokens, heads, like.device)
        for group in groups:
            # fp32 for 16-bit inputs too, in which the scale would be rounded, and the mean with it
            words = (_words_of(as_query, group), _words_of(as_key, group))
            yield score_mask(*words, plan.dropout_p)
        return
    shapes = [(group.sequences, heads, group.length, group.length) for group in groups]
    yield from keep_masks(shapes, plan.dropout_p, rng, like)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else (values * mask).to(values.dtype)


def _words_of(words: Tensor, group: Group) -> Tensor:
    """[heads, tokens] -> [sequences, heads, length]."""
    chosen = words.index_select(1, group.index)
    return chosen.unflatten(1, (group.sequences, group.length)).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, group: Group, plan: Plan) -> Tensor:
    bias = group.bias(q.dtype) if plan.window is None else _window(group, plan.window, q.dtype)
    if plan.alibi_slopes is None and bias is not None and _adds_up(q):
        # the product scales its terms and adds them to the bias on the way out
        scores = bias.expand(*q.shape[:-1], group.length).contiguous()
        keys = k.flatten(0, 1).transpose(1, 2)
        scores.flatten(0, 1).baddbmm_(q.flatten(0, 1), keys, alpha=plan.softmax_scale)
        return scores
    scores = (q * plan.softmax_scale) @ k.transpose(-1, -2)
    if plan.alibi_slopes is not None:
        place = torch.arange(group.length, device=q.device)
        distance = (place[:, None] - place).abs().to(q.dtype)
        scores = scores - plan.alibi_slopes.to(q)[:, None, None] * distance
    # an addition that broadcasts is several times faster on CPUs than masked_fill
    return scores if bias is None else scores.add_(bias)


def _adds_up(q: Tensor) -> bool:
    """Whether a product adds to what is there at no cost, and makes no NaN of minus infinity."""
    narrow = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return narrow and torch._C._get_mkldnn_enabled() and has_bf16_products()  # type: ignore


def _window(group: Group, window: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Minus infinity where a query does not see a key, [sequences or 1, 1, length, length]."""
    padding = group.padding
    left, right = window
    place = torch.arange(group.length, device=group.index.device)
    ahead = place - place[:, None]
    hidden = ((ahead < -left) | (ahead > right))[None, None]
    if padding is not None:
        # a padding query sees all real keys: one that sees none would be NaN, and reach gradients
        hidden = (hidden & ~padding[:, None, :, None]) | padding[:, None, None, :]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, -math.inf)


def _without_padding(gradient: Tensor, group: Group) -> Tensor:
    if group.padding is None:
        return gradient
    return gradient * (~group.padding).to(gradient.dtype)[:, None, :, None]


def _blank(like: Tensor, layout: Layout) -> Tensor:
    """Room for every row; those of no sequence are zero, the others are about to be written."""
    result = torch.empty_like(like, memory_format=torch.contiguous_format)
    result[layout.num_tokens() :].zero_()
    return result


def _gather(tensor: Tensor, group: Group) -> Tensor:
    """[tokens, heads, head_dim] -> [sequences, heads, length, head_dim]."""
    if group.start is not None:
        return _view(tensor, group)
    rows = tensor.index_select(0, group.index)
    return rows.view(group.sequences, group.length, *rows.shape[1:]).transpose(1, 2)


def _scatter(target: Tensor, group: Group, block: Tensor) -> None:
    """Write [sequences, heads, length, head_dim] back to the rows it came from."""
    if group.start is not None:
        _view(target, group).copy_(block)
        return
    rows = block.transpose(1, 2).flatten(0, 1)
    if group.padding is not None:
        rows = rows.index_select(0, group.slots)
    target.index_copy_(0, group.rows, rows)


def _view(tensor: Tensor, group: Group) -> Tensor:
    """The rows of a contiguous group where they lie, [sequences, heads, length, head_dim]."""
    assert group.start is not None
    rows = tensor.narrow(0, group.start, group.sequences * group.length)
    if group.sequences == 1:
        # most groups are of one sequence, and every call counts
        return rows.transpose(0, 1).unsqueeze(0)
    return rows.view(group.sequences, group.length, *rows.shape[1:]).transpose(1, 2)
