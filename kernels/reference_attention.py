"""Attention and rotary positions in plain PyTorch: the definition, the oracle in fp64, and the path
for CPUs.

Sequences of similar length are grouped, so that attention is a few batched products and no
[tokens, tokens] exists. Signatures are those of attention_ops.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.kernels.layout import Group, Layout
from fastbert.kernels.philox import Rng, keep_mask, score_mask, score_words


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
        masks = _attention_masks(plan, query)
        for group, mask in zip(layout.groups(), masks, strict=True):
            q, k, v = (_gather(tensor, group) for tensor in (query, key, value))
            scores = _scores(q, k, group, plan)
            probabilities = torch.softmax(scores, dim=-1)
            kept = _masked(probabilities, mask)
            _scatter(output, group, kept @ v)
            if plan.wants_lse:
                _scatter(lse, group, torch.logsumexp(scores.to(wide), dim=-1, keepdim=True))
            saved.append(probabilities)
        ctx.save_for_backward(*tensors, *saved)
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
        tensors, saved = _split(ctx.saved_tensors, len(layout.groups()))
        query, key, value = _parts(tensors)
        if grad_output is None:
            grad_output = torch.zeros_like(query)
        results = [_blank(tensor, layout) for tensor in tensors]
        grad_query, grad_key, grad_value = _parts(results)
        masks = _attention_masks(plan, query)
        for group, mask, probabilities in zip(layout.groups(), masks, saved, strict=True):
            q, k, v, grad = (_gather(tensor, group) for tensor in (query, key, value, grad_output))
            if torch.is_grad_enabled():
                # a second derivative needs the probabilities as a function of q and k
                probabilities = torch.softmax(_scores(q, k, group, plan), dim=-1)
            grad = _without_padding(grad, group)
            kept = _masked(probabilities, mask)
            grad_kept = grad @ v.transpose(-1, -2)
            grad_probabilities = _masked(grad_kept, mask)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            if grad_lse is not None:
                flowing = _gather(grad_lse.t().unsqueeze(-1), group)
                flowing = _without_padding(flowing, group).to(probabilities.dtype)
                grad_scores = grad_scores + probabilities * flowing
            _scatter(grad_query, group, grad_scores @ (k * plan.softmax_scale))
            _scatter(grad_key, group, grad_scores.transpose(-1, -2) @ (q * plan.softmax_scale))
            _scatter(grad_value, group, kept.transpose(-1, -2) @ grad)
        return (None, *results)


def _parts(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Query, key and value; of one fused tensor by selection, which may be written to."""
    return list(tensors) if len(tensors) == 3 else [tensors[0].select(1, i) for i in range(3)]


def _split(saved: tuple[Tensor, ...], groups: int) -> tuple[list[Tensor], list[Tensor]]:
    inputs = len(saved) - groups
    return list(saved[:inputs]), list(saved[inputs:])


def _attention_masks(plan: Plan, like: Tensor) -> list[Tensor | None]:
    """Each group's dropout mask, [sequences, heads, length, length]."""
    groups, rng = plan.layout.groups(), plan.rng
    tokens, heads, _ = like.shape
    if plan.dropout_p == 0.0:
        return [None] * len(groups)
    assert rng is not None
    if rng.exact or like.is_cuda:
        as_query, as_key = score_words(rng, tokens, heads, like.device)
        # fp32 for 16-bit inputs too, in which the scale would be rounded, and the mean with it
        return [
            score_mask(_words_of(as_query, group), _words_of(as_key, group), plan.dropout_p)
            for group in groups
        ]
    shapes = [(g.sequences, heads, g.length, g.length) for g in groups]
    sizes = [math.prod(shape) for shape in shapes]
    flat = keep_mask((sum(sizes),), plan.dropout_p, rng, like)
    parts = torch.split(flat, sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else (values * mask).to(values.dtype)


def _words_of(words: Tensor, group: Group) -> Tensor:
    """[heads, tokens] -> [sequences, heads, length]."""
    chosen = words.index_select(1, group.index)
    return chosen.unflatten(1, (group.sequences, group.length)).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, group: Group, plan: Plan) -> Tensor:
    scores = (q * plan.softmax_scale) @ k.transpose(-1, -2)
    if plan.alibi_slopes is not None:
        place = torch.arange(group.length, device=q.device)
        distance = (place[:, None] - place).abs().to(q.dtype)
        scores = scores - plan.alibi_slopes.to(q)[:, None, None] * distance
    hidden = _hidden(group, plan.window)
    if hidden is not None:
        # an addition that broadcasts is several times faster on CPUs than masked_fill
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        scores = scores + bias.masked_fill_(hidden, -math.inf)
    return scores


def _hidden(group: Group, window: tuple[int, int] | None) -> Tensor | None:
    """True where a query does not see a key, [sequences or 1, 1, length or 1, length]."""
    padding = group.padding
    if window is None:
        return None if padding is None else padding[:, None, None, :]
    left, right = window
    place = torch.arange(group.length, device=group.index.device)
    ahead = place - place[:, None]
    hidden = ((ahead < -left) | (ahead > right))[None, None]
    if padding is None:
        return hidden
    # a padding query sees all real keys: one that sees none would be NaN, and reach the gradients
    return (hidden & ~padding[:, None, :, None]) | padding[:, None, None, :]


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
