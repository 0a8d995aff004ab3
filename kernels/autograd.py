"""Triton kernels as torch.library operators, and their autograd. Imported only where Triton runs.

Eager code calls the launchers themselves; compiled code sees the registered operators, which cost
several times as much host time a call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import dropout, feed_forward, launch, layer_norm
from fastbert.kernels.checks import Draw, wants_gradient
from fastbert.kernels.registered import (
    Registered,
    refuse_second_derivative,
    row_contiguous,
)

dropout_rows = Registered(dropout.dropout_rows)
layer_norm_fwd = Registered(layer_norm.layer_norm_fwd)
layer_norm_bwd = Registered(layer_norm.layer_norm_bwd)
bias_activation_fwd = Registered(feed_forward.bias_activation_fwd)
bias_activation_bwd = Registered(feed_forward.bias_activation_bwd)
linear_activation = Registered(feed_forward.linear_activation)


@dropout_rows.operator.register_fake
def _(x, *draw):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@layer_norm_fwd.operator.register_fake
def _(x, x_bias, residual, weight, bias, *rest):  # type: ignore[no-untyped-def]
    dtype, wants_total, wants_statistics = rest[-3:]
    rows, width = x.shape
    statistics = rows if wants_statistics else 0
    return (
        x.new_empty((rows, width), dtype=dtype),
        x.new_empty((rows if wants_total else 0, width), dtype=dtype),
        x.new_empty(statistics, dtype=torch.float32),
        x.new_empty(statistics, dtype=torch.float32),
    )


@layer_norm_bwd.operator.register_fake
def _(dy, dtotal, x, *rest):  # type: ignore[no-untyped-def]
    wants_x_bias, dx_dtype, dresidual_dtype = rest[-3:]
    rows, width = x.shape
    return (
        x.new_empty((rows, width), dtype=dx_dtype),
        x.new_empty(
            (rows if dresidual_dtype is not None else 0, width), dtype=dresidual_dtype or dx_dtype
        ),
        x.new_empty((3 if wants_x_bias else 2, width), dtype=torch.float32),
    )


@bias_activation_fwd.operator.register_fake
def _(pre, bias, activation, gated):  # type: ignore[no-untyped-def]
    rows, wide = pre.shape
    return pre.new_empty((rows, wide // 2 if gated else wide))


@bias_activation_bwd.operator.register_fake
def _(dout, pre, bias, activation, gated):  # type: ignore[no-untyped-def]
    rows, wide = pre.shape
    return (
        pre.new_empty((rows, wide)),
        pre.new_empty((rows, wide // 2 if gated else wide)),
        pre.new_empty(wide if bias is not None else 0, dtype=torch.float32),
    )


@linear_activation.operator.register_fake
def _(x, weight, bias, activation, wants_pre):  # type: ignore[no-untyped-def]
    rows, width = x.shape[0], weight.shape[0]
    return x.new_empty((rows if wants_pre else 0, width)), x.new_empty((rows, width))


def dropped(x: Tensor, draw: Draw) -> Tensor:
    """dropout of rows, differentiable."""
    return _Dropout.apply(x, draw) if wants_gradient(x) else dropout_rows(x, *draw)


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    draw: Draw,
    eps: float,
    dtype: torch.dtype,
    wants_total: bool,
) -> tuple[Tensor, Tensor]:
    """Output and total (empty where not wanted) of layer_norm, differentiable."""
    if not wants_gradient(x, weight, bias, x_bias, residual):
        arguments = (x, x_bias, residual, weight, bias, *draw, eps, dtype, wants_total, False)
        y, total, _, _ = layer_norm_fwd(*arguments)
        return y, total
    return _LayerNorm.apply(x, weight, bias, x_bias, residual, draw, eps, dtype, wants_total)


def activated(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """feed_forward and gated_feed_forward, differentiable; all but the biases in one dtype."""
    if not wants_gradient(x, w1, b1, w2, b2):
        _, out = _first_half(x, w1, b1, activation, gated, wants_pre=False)
        return F.linear(out, w2, b2 if b2 is None else b2.to(x.dtype))
    return _FeedForward.apply(x, w1, b1, w2, b2, activation, gated)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Draw) -> Tensor:
        state, sequence_ids, positions, *ctx.numbers = draw
        ctx.save_for_backward(state, sequence_ids, positions)
        return dropout_rows(x, *draw)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative("dropout")
        return dropout_rows(row_contiguous(dy), *ctx.saved_tensors, *ctx.numbers), None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        x_bias: Tensor | None,
        residual: Tensor | None,
        draw: Draw,
        eps: float,
        dtype: torch.dtype,
        wants_total: bool,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = layer_norm_fwd(
            x, x_bias, residual, weight, bias, *draw, eps, dtype, wants_total, True
        )
        state, sequence_ids, positions, *ctx.scalars = draw
        # the sum stands in for the parts it was made of
        parts = (total, None, None) if wants_total else (x, x_bias, residual)
        ctx.save_for_backward(weight, mean, rstd, state, sequence_ids, positions, *parts)
        ctx.x_is_total = wants_total
        ctx.dtypes = (
            x.dtype,
            weight.dtype,
            bias.dtype,
            None if x_bias is None else x_bias.dtype,
            None if residual is None else residual.dtype,
        )
        if not wants_total:
            ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> Any:
        refuse_second_derivative("layer_norm")
        weight, mean, rstd, state, sequence_ids, positions, x, x_bias, residual = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype, x_bias_dtype, residual_dtype = ctx.dtypes
        if dy is None:
            dy = torch.zeros_like(x)
        layer, site, dropout_p = ctx.scalars
        has_residual = residual_dtype is not None
        separate = has_residual and (state is not None or residual_dtype != x_dtype)
        dx, dresidual, sums = layer_norm_bwd(
            row_contiguous(dy),
            row_contiguous(dtotal) if ctx.x_is_total and dtotal is not None else None,
            x,
            x_bias,
            residual,
            weight,
            mean,
            rstd,
            state,
            sequence_ids,
            positions,
            layer,
            site,
            dropout_p,
            ctx.x_is_total,
            x_bias_dtype is not None,
            x_dtype,
            residual_dtype if separate else None,
        )
        if not separate:
            dresidual = dx if has_residual else None
        return (
            dx,
            sums[0].to(weight_dtype),
            sums[1].to(bias_dtype),
            None if x_bias_dtype is None else sums[2].to(x_bias_dtype),
            dresidual,
            None,
            None,
            None,
            None,
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        gated: bool,
    ) -> Tensor:
        pre, out = _first_half(x, w1, b1, activation, gated, wants_pre=True)
        ctx.save_for_backward(x, w1, b1, w2, pre)
        ctx.plan = (activation, gated, None if b2 is None else b2.dtype)
        return F.linear(out, w2, b2 if b2 is None else b2.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative("feed_forward")
        x, w1, b1, w2, pre = ctx.saved_tensors
        activation, gated, b2_dtype = ctx.plan
        needs_x, needs_w1, _, needs_w2, _, _, _ = ctx.needs_input_grad
        dpre, out, db1 = bias_activation_bwd(dy @ w2, pre, b1, activation, gated)
        dw2 = dy.t() @ out if needs_w2 else None
        del out
        return (
            dpre @ w1 if needs_x else None,
            dpre.t() @ x if needs_w1 else None,
            None if b1 is None else db1.to(b1.dtype),
            dw2,
            None if b2_dtype is None else dy.sum(dim=0, dtype=torch.float32).to(b2_dtype),
            None,
            None,
        )


def _first_half(
    x: Tensor, w1: Tensor, b1: Tensor | None, activation: str, gated: bool, *, wants_pre: bool
) -> tuple[Tensor, Tensor]:
    # compiled code leaves the product to the compiler, which tunes its own
    if not (gated or b1 is None or torch.compiler.is_compiling()) and launch.measured(
        "linear_activation", x, w1.shape[0]
    ):
        return linear_activation(x, w1, b1, activation, wants_pre)  # type: ignore[no-any-return]
    pre = F.linear(x, w1)
    return pre, bias_activation_fwd(pre, b1, activation, gated)
