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
from fastbert.kernels.philox import (
    SCORE_BITS,
    Rng,
    as_signs,
    drop_signs,
    keep_masks,
    keep_scale,
    score_mask,
    score_words,
)
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
        parts = _parts(tensors)
        query, layout = parts[0], plan.layout
        tokens, heads, width = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((tokens if plan.wants_lse else 0, heads, 1), -math.inf, dtype=wide)
        output = _blank(query, layout, *query.shape)
        fuses, scale, signs = _fuses(plan, query), _scale(plan, query), _signs(plan, query)
        saved = []
        for blocks in layout.chunks(query.dtype, heads, width):
            of_parts = [blocks.take(tensor) for tensor in parts]
            if fuses:
                found = [
                    _FUSED(*block, 0.0, False, scale=plan.softmax_scale)
                    for block in zip(*of_parts, strict=True)
                ]
                blocks.give(output.unsqueeze(1), [[block for block, _ in found]])
                saved += [kept for _, kept in found]
                continue
            flat, (attended,) = blocks.room(query, 1)
            sums = []
            for group, out, q, k, v in zip(blocks.groups, attended, *of_parts, strict=True):
                scores = _scores(q, k, group, plan)
                probabilities = torch.softmax(scores, dim=-1)
                if plan.wants_lse:
                    sums.append(torch.logsumexp(scores.to(wide), dim=-1, keepdim=True))
                saved.append(_signed(probabilities, next(signs)))
                kept = torch.relu(probabilities) if plan.dropout_p else probabilities
                _times(kept, v, scale, out=out)
            blocks.give(output.unsqueeze(1), [attended], flat)
            if plan.wants_lse:
                blocks.give(lse.unsqueeze(1), [sums], fill=-math.inf)
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
        parts = _parts(tensors)
        query = parts[0]
        parts.append(torch.zeros_like(query) if grad_output is None else grad_output)
        if grad_lse is not None:
            parts.append(grad_lse.t().unsqueeze(-1).contiguous())
        # a second derivative needs the probabilities as a function of q and k
        if torch.is_grad_enabled():
            gradients = _gradients_twice(plan, parts)
        else:
            gradients = _gradients(plan, parts, output, iter(saved))
        return None, *((gradients,) if len(tensors) == 1 else gradients.unbind(1))


def _gradients(
    plan: Plan, parts: list[Tensor], output: Tensor | None, saved: Iterator[Tensor]
) -> Tensor:
    """Of query, key and value, [tokens, 3, heads, head_dim].

    Takes query, key, value, the result's gradient and perhaps its log-sum-exp's; the result, where
    torch's fused attention made it; and what each group has saved.
    """
    query, layout = parts[0], plan.layout
    tokens, heads, width = query.shape
    result = _blank(query, layout, tokens, 3, heads, width)
    for blocks in layout.chunks(query.dtype, heads, width):
        of_parts = [blocks.take(tensor) for tensor in parts]
        if output is not None:
            of_parts.append(blocks.take(output))
            found = [
                _FUSED_BACKWARD(
                    grad, q, k, v, attended, next(saved), 0.0, False, scale=plan.softmax_scale
                )
                for q, k, v, grad, attended in zip(*of_parts, strict=True)
            ]
            blocks.give(result, [list(of_part) for of_part in zip(*found, strict=True)])
            continue
        flat, room = blocks.room(query, 3)
        for group, dq, dk, dv, q, k, v, grad, *more in zip(
            blocks.groups, *room, *of_parts, strict=True
        ):
            written = (dq, dk, dv)
            _write_gradients(plan, group, written, next(saved), (q, k, v), grad, *more)
        blocks.give(result, room, flat)
    return result


def _gradients_twice(plan: Plan, parts: list[Tensor]) -> Tensor:
    """The same up to rounding, as functions of query and key: for a second derivative."""
    query, layout = parts[0], plan.layout
    blocks = layout.whole(query.dtype, query.shape[1])
    of_parts = [blocks.take(tensor) for tensor in parts]
    if not blocks.groups:
        return torch.zeros_like(torch.stack(parts[:3], dim=1))
    masks = _attention_masks(plan, query)
    found = [
        _block_gradients(plan, group, mask, *of_group)
        for group, mask, *of_group in zip(blocks.groups, masks, *of_parts, strict=True)
    ]
    return blocks.joined([list(of_part) for of_part in zip(*found, strict=True)])


def _write_gradients(
    plan: Plan,
    group: Group,
    written: tuple[Tensor, Tensor, Tensor],
    signed: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    grad_lse: Tensor | None = None,
) -> None:
    """Write gradients of one block's query, key and value, from its probabilities with signs."""
    q, k, v = inputs
    dq, dk, dv = written
    scale = _scale(plan, q)
    grad = _without_padding(grad, group)
    grad_probabilities = torch.empty_like(signed)
    _times(grad, v.transpose(-1, -2), scale, out=grad_probabilities)
    kept = probabilities = signed
    if plan.dropout_p:
        kept, probabilities = torch.relu(signed), signed.abs()
        # nothing flows to what is negative
        grad_probabilities = torch.ops.aten.threshold_backward(grad_probabilities, signed, 0)
    grad_scores = torch.ops.aten._softmax_backward_data(
        grad_probabilities, probabilities, -1, probabilities.dtype
    )
    if grad_lse is not None:
        flowing = _without_padding(grad_lse, group).to(probabilities.dtype)
        grad_scores = grad_scores + probabilities * flowing
    _times(grad_scores, k, plan.softmax_scale, out=dq)
    _times(grad_scores.transpose(-1, -2), q, plan.softmax_scale, out=dk)
    _times(kept.transpose(-1, -2), grad, scale, out=dv)


def _block_gradients(
    plan: Plan,
    group: Group,
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's query, key and value, as functions of what is given."""
    probabilities = torch.softmax(_scores(q, k, group, plan), dim=-1)
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


def _signed(probabilities: Tensor, signs: Tensor | None) -> Tensor:
    """Made negative where they are dropped, in place."""
    if signs is not None:
        probabilities.view(signs.dtype).bitwise_or_(signs)
    return probabilities


def _times(first: Tensor, second: Tensor, scale: float, *, out: Tensor) -> None:
    """Matrix products of blocks, scaled before they are rounded."""
    first, second = first.flatten(0, 1), second.flatten(0, 1)
    out.flatten(0, 1).baddbmm_(first, second, beta=0, alpha=scale)


def _scale(plan: Plan, like: Tensor) -> float:
    """What kept probabilities are multiplied by."""
    if plan.dropout_p == 0.0:
        return 1.0
    assert plan.rng is not None
    exact = plan.rng.exact or like.is_cuda
    return keep_scale(plan.dropout_p, SCORE_BITS) if exact else keep_scale(plan.dropout_p)


def _signs(plan: Plan, like: Tensor) -> Iterator[Tensor | None]:
    """What makes each group's dropped probabilities negative, in place of a mask."""
    rng, groups = plan.rng, plan.layout.groups(like.dtype)
    if plan.dropout_p == 0.0 or rng is None or rng.exact or like.is_cuda:
        for mask in _attention_masks(plan, like):
            yield None if mask is None else as_signs(mask == 0.0, like)
        return
    shapes = [(group.sequences, like.shape[1], group.length, group.length) for group in groups]
    yield from drop_signs(shapes, plan.dropout_p, rng, like)


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
    wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    yield from keep_masks(shapes, plan.dropout_p, rng, wide)


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
    real = group.real(gradient.dtype)
    return gradient if real is None else gradient * real


def _blank(like: Tensor, layout: Layout, *shape: int) -> Tensor:
    """Room for every row; those of no sequence are zero, the others are about to be written."""
    result = like.new_empty(shape)
    result[layout.num_tokens() :].zero_()
    return result
