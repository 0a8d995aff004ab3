"""The pass between the two matrix products of a feed-forward block.

    out = act(pre + bias)                  act: erf-GELU or tanh-GELU
    out = act(a + bias_a) * (g + bias_g)   gated, pre = [a | g]
    backward, from dout and pre: dpre = dout act'(pre + bias), and out and dbias once more

Saved for backward: pre alone, without its bias. Recomputed: the activation, which the gradient of
the second product's weight needs. `linear_activation` is the second implementation: one persistent
matrix product with the pass in its epilogue, for rows of the launch table that name it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels.column_sum import column_sum

_UNSPECIALISED = ["rows", "blocks_per_program"]


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation at x, fp32."""
    if ACTIVATION == "gelu":
        # 1 / sqrt(2), and 1 / sqrt(2 pi) of the normal density
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        # exp(-x^2 / 2), as a power of two: an instruction, where exp guards against denormals
        slope = share + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    else:
        # (1 + tanh(u)) / 2 is the logistic function of 2 u, here by exp(-|2 u|): no overflow, and
        # no digits lost in 1 - tanh^2
        doubled = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        small = tl.exp2(-1.4426950408889634 * tl.abs(doubled))
        large_share = 1.0 / (1.0 + small)
        small_share = small * large_share
        share = tl.where(x >= 0, large_share, small_share)
        doubled_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        slope = share + x * large_share * small_share * doubled_slope
    return x * share, slope


@triton.jit
def _bias(bias_ptr, column, column_mask):
    """[1, columns] fp32, zeros where there is no bias."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros_like(column).to(tl.float32)
    return bias[None, :]


@triton.jit
def _tile(ptr, wide_row, row_stride, column, mask):
    place = ptr + wide_row[:, None] * row_stride + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


# one program makes one tile of the output
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _bias_activation_fwd_kernel(
    pre_ptr, bias_ptr, out_ptr,
    pre_row_stride,
    rows,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # along one axis, the only one that takes more than 65,535 programs
    column_tiles = tl.cdiv(WIDTH, BLOCK_N)
    row = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < WIDTH
    mask = (row < rows)[:, None] & column_mask[None, :]
    wide_row = row.to(tl.int64)
    pre = _tile(pre_ptr, wide_row, pre_row_stride, column, mask)
    out, _ = _activation(pre + _bias(bias_ptr, column, column_mask), ACTIVATION)
    if GATED:
        gate = _tile(pre_ptr, wide_row, pre_row_stride, WIDTH + column, mask)
        out *= gate + _bias(bias_ptr, WIDTH + column, column_mask)
    tl.store(out_ptr + wide_row[:, None] * WIDTH + column[None, :], out, mask=mask)


# one program owns BLOCK_N columns and walks blocks of rows, so that the bias gradient stays in
# registers until the end
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _bias_activation_bwd_kernel(
    dout_ptr, pre_ptr, bias_ptr, dpre_ptr, out_ptr, partial_ptr,
    dout_row_stride, pre_row_stride,
    rows, blocks_per_program,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    program = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < WIDTH
    bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate_bias_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias = _bias(bias_ptr, column, column_mask)
    if GATED:
        gate_bias = _bias(bias_ptr, WIDTH + column, column_mask)
    # the next blocks are on their way while one is worked on
    for block in tl.range(0, blocks_per_program, num_stages=STAGES):
        row = (block * tl.num_programs(1) + program) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & column_mask[None, :]
        wide_row = row.to(tl.int64)
        pre = _tile(pre_ptr, wide_row, pre_row_stride, column, mask)
        dout = _tile(dout_ptr, wide_row, dout_row_stride, column, mask)
        value, slope = _activation(pre + bias, ACTIVATION)
        dpre_place = dpre_ptr + wide_row[:, None] * WIDE + column[None, :]
        if GATED:
            gate = _tile(pre_ptr, wide_row, pre_row_stride, WIDTH + column, mask) + gate_bias
            dgate = dout * value
            tl.store(dpre_place + WIDTH, dgate, mask=mask)
            gate_bias_sum += dgate
            dout *= gate
            value *= gate
        dpre = dout * slope
        bias_sum += dpre
        tl.store(dpre_place, dpre, mask=mask)
        tl.store(out_ptr + wide_row[:, None] * WIDTH + column[None, :], value, mask=mask)
    if partial_ptr is not None:
        place = partial_ptr + program * WIDE + column
        tl.store(place, tl.sum(bias_sum, axis=0), mask=column_mask)
        if GATED:
            tl.store(place + WIDTH, tl.sum(gate_bias_sum, axis=0), mask=column_mask)


# persistent: one program a processor walks the tiles of the output, a group of GROUP_M rows of
# tiles at a time, so that tiles at work together share their operands in the cache
@triton.jit(do_not_specialize=["rows", "tiles_per_program"])
def _linear_activation_kernel(
    x_ptr, w_ptr, bias_ptr, pre_ptr, out_ptr,
    x_row_stride, w_row_stride,
    rows, tiles_per_program,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(WIDTH, BLOCK_N)
    for step in range(0, tiles_per_program):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        group_first = tile // (GROUP_M * column_tiles) * GROUP_M
        group_rows = tl.maximum(tl.minimum(row_tiles - group_first, GROUP_M), 1)
        within = tile % (GROUP_M * column_tiles)
        row = (group_first + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
        column = within // group_rows * BLOCK_N + tl.arange(0, BLOCK_N)
        row_mask = row < rows
        column_mask = column < WIDTH
        depth = tl.arange(0, BLOCK_K)
        x_tile = x_ptr + row.to(tl.int64)[:, None] * x_row_stride + depth[None, :]
        w_tile = w_ptr + column.to(tl.int64)[None, :] * w_row_stride + depth[:, None]
        pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, DEPTH, BLOCK_K):
            depth_mask = depth < DEPTH - first
            x = tl.load(x_tile + first, mask=row_mask[:, None] & depth_mask[None, :], other=0.0)
            w = tl.load(w_tile + first, mask=depth_mask[:, None] & column_mask[None, :], other=0.0)
            pre = tl.dot(x, w, pre, input_precision=PRECISION)
        mask = row_mask[:, None] & column_mask[None, :]
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + place, pre, mask=mask)
        pre += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        out, _ = _activation(pre, ACTIVATION)
        tl.store(out_ptr + place, out, mask=mask)


def bias_activation_fwd(pre: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """[rows, width] of pre's dtype from [rows, width], or from [rows, 2 width] where gated."""
    rows, wide = pre.shape
    width = wide // 2 if gated else wide
    out = torch.empty((rows, width), dtype=pre.dtype, device=pre.device)
    if rows == 0:
        return out
    chosen = launch.configure("bias_activation_fwd", pre, width)
    launch.run(
        _bias_activation_fwd_kernel,
        (triton.cdiv(width, chosen.columns) * triton.cdiv(rows, chosen.rows),),
        pre, bias, out,
        pre.stride(0),
        rows,
        launch=chosen, WIDTH=width, ACTIVATION=activation, GATED=gated,
        BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
    )  # fmt: skip
    return out


def bias_activation_bwd(
    dout: Tensor, pre: Tensor, bias: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre like pre, out like dout, and dbias fp32 (empty where there is no bias)."""
    rows, wide = pre.shape
    width = wide // 2 if gated else wide
    dpre = torch.empty((rows, wide), dtype=pre.dtype, device=pre.device)
    out = torch.empty((rows, width), dtype=pre.dtype, device=pre.device)
    if rows == 0:
        return dpre, out, pre.new_zeros(wide if bias is not None else 0, dtype=torch.float32)
    chosen = launch.configure("bias_activation_bwd", pre, width)
    blocks, column_blocks = triton.cdiv(rows, chosen.rows), triton.cdiv(width, chosen.columns)
    programs = launch.programs(pre, chosen, blocks * column_blocks)
    walkers = min(blocks, triton.cdiv(programs, column_blocks))
    partial = torch.empty(
        (walkers, wide if bias is not None else 0), dtype=torch.float32, device=pre.device
    )
    launch.run(
        _bias_activation_bwd_kernel,
        (column_blocks, walkers),
        dout, pre, bias, dpre, out, partial if bias is not None else None,
        dout.stride(0), pre.stride(0),
        rows, triton.cdiv(blocks, walkers),
        launch=chosen, WIDTH=width, ACTIVATION=activation, GATED=gated,
        BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, STAGES=chosen.num_stages,
    )  # fmt: skip
    return dpre, out, column_sum(partial) if bias is not None else partial.view(-1)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str, wants_pre: bool
) -> tuple[Tensor, Tensor]:
    """pre = x weight' (empty where not wanted) and act(pre + bias), in one kernel."""
    rows, depth = x.shape
    width = weight.shape[0]
    pre = torch.empty((rows if wants_pre else 0, width), dtype=x.dtype, device=x.device)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows == 0:
        return pre, out
    chosen = launch.configure("linear_activation", x, width)
    tiles = triton.cdiv(rows, chosen.rows) * triton.cdiv(width, chosen.columns)
    programs = launch.programs(x, chosen, tiles)
    launch.run(
        _linear_activation_kernel,
        (programs,),
        x, weight, bias, pre if wants_pre else None, out,
        x.stride(0), weight.stride(0),
        rows, triton.cdiv(tiles, programs),
        launch=chosen, WIDTH=width, DEPTH=depth, ACTIVATION=activation,
        PRECISION=launch.product_precision(),
        BLOCK_M=chosen.rows, BLOCK_N=chosen.columns, BLOCK_K=chosen.inner, GROUP_M=8,
    )  # fmt: skip
    return pre, out
