"""Attention's kernels as torch.library operators, and their autograd; see autograd.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import attention, attention_backward
from fastbert.kernels import attention_words as words_kernel
from fastbert.kernels import rotary as rotary_kernel
from fastbert.kernels.checks import wants_gradient
from fastbert.kernels.reference_attention import Plan
from fastbert.kernels.registered import (
    Registered,
    refuse_second_derivative,
    row_contiguous,
)

attention_fwd = Registered(attention.attention_fwd)
attention_bwd = Registered(attention_backward.attention_bwd)
attention_words = Registered(words_kernel.attention_words)
rotary_turn = Registered(rotary_kernel.rotary)

WIDEST_WINDOW = 1 << 30

# behind the tensors of both launchers; the first half may hold tensors
Context = tuple[Any, ...]


@attention_fwd.operator.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((heads, tokens), dtype=torch.float32)


@attention_bwd.operator.register_fake
def _(dout, dlse, query, *rest):  # type: ignore[no-untyped-def]
    tokens, heads, head_dim = query.shape
    return query.new_empty((tokens, 3, heads, head_dim))


@attention_words.operator.register_fake
def _(state, sequence_ids, positions, tokens, heads):  # type: ignore[no-untyped-def]
    return state.new_empty((2, heads, tokens), dtype=torch.int32)


@rotary_turn.operator.register_fake
def _(qkv, cos, sin, positions, inverse):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape)


# words, state, layer, site, dropout_p: what a kernel needs for its mask
Draw = tuple[Tensor | None, Tensor | None, int, int, float]


def draw(plan: Plan, tokens: int, heads: int, device: torch.device) -> Draw:
    """The plan's mask as kernels take it."""
    rng = plan.rng
    if plan.dropout_p == 0.0 or rng is None:
        return None, None, 0, 0, 0.0
    state, words = rng.device_state(device), rng.words
    if words is None or words.shape != (2, heads, tokens) or words.device != device:
        words = attention_words(state, *rng.coordinates(), tokens, heads)
    return words, state, rng.layer, rng.site, plan.dropout_p


def attended(tensors: tuple[Tensor, ...], plan: Plan) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of query, key and value or of one fused projection, differentiable."""
    rows, tiles = plan.layout.rows(), plan.layout.tiles()
    tokens, heads = tensors[0].shape[0], tensors[0].shape[-2]
    drawn = draw(plan, tokens, heads, tensors[0].device)
    slopes = plan.alibi_slopes
    if slopes is not None:
        slopes = slopes.detach().to(tensors[0].device, torch.float32).contiguous()
    before, after = plan.window or (None, None)
    if plan.window is not None:
        # a sum of row and window stays within 32 bits, and kernels know windows by number: not by
        # one that follows the batch
        before, after = (min(width, WIDEST_WINDOW) for width in plan.window)
    block = plan.layout.block or 0
    held = (rows.starts, rows.ends, tiles, slopes)
    numbers = (block, before, after, plan.softmax_scale)
    if not wants_gradient(*tensors):
        out, lse = attention_fwd(*_parts(tensors), *_context(held, numbers, drawn))
    else:
        out, lse = _Attention.apply(held, numbers, drawn, plan.wants_lse, *tensors)
    # kernels keep it to base two
    return out, lse * math.log(2.0) if plan.wants_lse else lse


def turned(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, differentiable in the projection."""
    if not wants_gradient(qkv):
        return rotary_turn(qkv, cos, sin, positions, False)  # type: ignore[no-any-return]
    return _Rotary.apply(qkv, cos, sin, positions)


class _Attention(torch.autograd.Function):
    """Takes the fused projection, or query, key and value; gradients come as the inputs came."""

    @staticmethod
    def forward(
        ctx: Any,
        held: tuple[Tensor | None, ...],
        numbers: tuple[Any, ...],
        drawn: Draw,
        wants_lse: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_fwd(*_parts(tensors), *_context(held, numbers, drawn))
        ctx.save_for_backward(out, lse, *held, *drawn[:2], *tensors)
        ctx.numbers, ctx.scalars = numbers, drawn[2:]
        ctx.set_materialize_grads(False)
        if not wants_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        refuse_second_derivative("attention")
        out, lse, *rest = ctx.saved_tensors
        held, drawn, tensors = tuple(rest[:4]), (*rest[4:6], *ctx.scalars), tuple(rest[6:])
        if dout is None:
            dout = torch.zeros_like(out)
        context = _context(held, ctx.numbers, drawn)
        dqkv = attention_bwd(row_contiguous(dout), dlse, *_parts(tensors), out, lse, *context)
        gradients = (dqkv,) if len(tensors) == 1 else dqkv.unbind(1)
        return (None, None, None, None, *gradients)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        return rotary_turn(qkv, cos, sin, positions, False)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_second_derivative("rotary")
        return rotary_turn(row_contiguous(gradients[0]), *ctx.saved_tensors, True), None, None, None


def _parts(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if len(tensors) == 3 else tensors[0].unbind(1)


def _context(
    held: tuple[Tensor | None, ...], numbers: tuple[Any, ...], drawn: tuple[Any, ...]
) -> Context:
    starts, ends, tiles, slopes = held
    block, before, after, softmax_scale = numbers
    return (starts, ends, tiles, block, slopes, before, after, softmax_scale, *drawn)
