"""y = LayerNorm(total) with total = residual + dropout(x + x_bias), each part optional.

    mean = E[total];  rstd = (E[(total - mean)^2] + eps)^-1/2;  xhat = (total - mean) rstd
    y = xhat * weight + bias
    g = dy * weight;  dtotal = rstd (g - E[g] - xhat E[g xhat])
    dresidual = dtotal;  dx = dtotal * mask;  dweight = sum dy xhat;  dbias = sum dy;
    dx_bias = sum dx

Saved for backward: x, residual and the fp32 mean and rstd of each row. Recomputed: the sum, the
dropout mask and xhat, in fp32 (where the sum was asked for, it is saved in place of the parts).
"""

# ruff: noqa: RUF005  Triton knows tuples by concatenation
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels.column_sum import column_sum
from fastbert.kernels.dropout import keep_factors, row_coordinates, subkey
from fastbert.kernels.philox import keep_scale, keep_threshold

_UNSPECIALISED = ["rows", "layer", "site", "blocks_per_program"]


@triton.jit
def _column_mask(columns, row_mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    # a full chunk needs no test of its columns, and vector loads stay whole
    if WIDTH % CHUNK == 0:
        mask = row_mask[:, None]
    else:
        mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def parameter_row(ptr, columns, WIDTH: tl.constexpr):
    """[1, columns] fp32, for loops: before the loop, it crosses from thread to thread once."""
    return tl.load(ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def parameter_tile(ptr, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """[ROWS, CHUNK] fp32, the same in all rows.

    A vector would be read by other threads than need it, go through shared memory, and hold up
    the loads behind it at the barriers; a tile is read where it is needed, out of the cache.
    """
    place = ptr + (tl.zeros([ROWS, 1], tl.int32) + columns[None, :])
    if WIDTH % CHUNK == 0:
        values = tl.load(place)
    else:
        values = tl.load(place, mask=(columns < WIDTH)[None, :], other=0.0)
    return values.to(tl.float32)


@triton.jit
def _sum_of_parts(
    x_ptr, x_bias, residual_ptr,
    x_offset, residual_offset, columns, mask, keep,
):  # fmt: skip
    total = tl.load(x_ptr + x_offset[:, None] + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    if x_bias is not None:
        total += x_bias
    if keep is not None:
        total *= keep
    if residual_ptr is not None:
        total += tl.load(
            residual_ptr + residual_offset[:, None] + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    return total


# one program normalises ROWS rows; a row lies in registers as CHUNKS pieces of CHUNK columns
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _layer_norm_fwd_kernel(
    x_ptr, x_bias_ptr, residual_ptr, weight_ptr, bias_ptr,
    y_ptr, total_ptr, mean_ptr, rstd_ptr,
    state_ptr, sequence_ids_ptr, positions_ptr,
    x_row_stride, residual_row_stride,
    rows, layer, site,
    WIDTH: tl.constexpr, EPS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    wide_row = row.to(tl.int64)
    if state_ptr is not None:
        key = subkey(state_ptr, layer, site)
        sequence, position = row_coordinates(
            state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask
        )
    pieces = ()
    # chunks are added up first, so that threads exchange sums once a row
    chunk_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = _column_mask(columns, row_mask, WIDTH, CHUNK)
        keep = None
        if state_ptr is not None:
            keep = keep_factors(key, sequence, position, chunk * CHUNK, CHUNK, THRESHOLD, SCALE)
        x_bias = None
        if x_bias_ptr is not None:
            x_bias = parameter_tile(x_bias_ptr, columns, ROWS, WIDTH, CHUNK)
        piece = _sum_of_parts(
            x_ptr, x_bias, residual_ptr,
            wide_row * x_row_stride, wide_row * residual_row_stride, columns, mask, keep,
        )  # fmt: skip
        chunk_sum += piece
        pieces = pieces + (piece,)
        if total_ptr is not None:
            tl.store(total_ptr + wide_row[:, None] * WIDTH + columns[None, :], piece, mask=mask)
    mean = tl.sum(chunk_sum, axis=1) / WIDTH
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        centred = pieces[chunk] - mean[:, None]
        if WIDTH % CHUNK != 0:
            centred = tl.where((columns < WIDTH)[None, :], centred, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + EPS)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_mask)
        tl.store(rstd_ptr + row, rstd, mask=row_mask)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = _column_mask(columns, row_mask, WIDTH, CHUNK)
        weight = parameter_tile(weight_ptr, columns, ROWS, WIDTH, CHUNK)
        bias = parameter_tile(bias_ptr, columns, ROWS, WIDTH, CHUNK)
        y = (pieces[chunk] - mean[:, None]) * rstd[:, None] * weight + bias
        tl.store(y_ptr + wide_row[:, None] * WIDTH + columns[None, :], y, mask=mask)


# one program walks blocks of ROWS rows, a fixed stride apart, and keeps its share of the
# parameter gradients in registers until the end
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, partial_ptr,
    state_ptr, sequence_ids_ptr, positions_ptr,
    dy_row_stride, dtotal_row_stride, x_row_stride, residual_row_stride,
    rows, blocks_per_program, layer, site,
    WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, X_IS_TOTAL: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    weight_sums, bias_sums, x_bias_sums = (), (), ()
    weights, x_biases = (), ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = weights + (parameter_row(weight_ptr, columns, WIDTH),)
        if x_bias_ptr is not None:
            x_biases = x_biases + (parameter_row(x_bias_ptr, columns, WIDTH),)
        weight_sums = weight_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        bias_sums = bias_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        if SUMS == 3:
            x_bias_sums = x_bias_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    if state_ptr is not None:
        key = subkey(state_ptr, layer, site)
    # the next block is on its way while one is worked on
    for block in tl.range(0, blocks_per_program, num_stages=STAGES):
        row = (block * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
        row_mask = row < rows
        wide_row = row.to(tl.int64)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        if state_ptr is not None:
            sequence, position = row_coordinates(
                state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask
            )
        normed_pieces, scaled_pieces, keep_pieces = (), (), ()
        new_weight_sums, new_bias_sums, new_x_bias_sums = (), (), ()
        scaled_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        product_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = _column_mask(columns, row_mask, WIDTH, CHUNK)
            keep = None
            if state_ptr is not None:
                keep = keep_factors(key, sequence, position, chunk * CHUNK, CHUNK, THRESHOLD, SCALE)
                keep_pieces = keep_pieces + (keep,)
            total = _sum_of_parts(
                x_ptr, x_biases[chunk] if x_bias_ptr is not None else None, residual_ptr,
                wide_row * x_row_stride, wide_row * residual_row_stride,
                columns, mask, None if X_IS_TOTAL else keep,
            )  # fmt: skip
            dy = tl.load(
                dy_ptr + wide_row[:, None] * dy_row_stride + columns[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            normed = (total - mean[:, None]) * rstd[:, None]
            scaled = dy * weights[chunk]
            scaled_sum += scaled
            product_sum += scaled * normed
            new_weight_sums = new_weight_sums + (weight_sums[chunk] + dy * normed,)
            new_bias_sums = new_bias_sums + (bias_sums[chunk] + dy,)
            normed_pieces = normed_pieces + (normed,)
            scaled_pieces = scaled_pieces + (scaled,)
        scaled_mean = tl.sum(scaled_sum, axis=1) / WIDTH
        product_mean = tl.sum(product_sum, axis=1) / WIDTH
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = _column_mask(columns, row_mask, WIDTH, CHUNK)
            gradient = scaled_pieces[chunk] - scaled_mean[:, None]
            gradient -= normed_pieces[chunk] * product_mean[:, None]
            gradient *= rstd[:, None]
            if dtotal_ptr is not None:
                gradient += tl.load(
                    dtotal_ptr + wide_row[:, None] * dtotal_row_stride + columns[None, :],
                    mask=mask, other=0.0,
                ).to(tl.float32)  # fmt: skip
            place = wide_row[:, None] * WIDTH + columns[None, :]
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + place, gradient, mask=mask)
            if state_ptr is not None:
                gradient *= keep_pieces[chunk]
            tl.store(dx_ptr + place, gradient, mask=mask)
            if SUMS == 3:
                # rows and columns past the end hold what is no gradient
                gradient = tl.where(mask, gradient, 0.0)
                new_x_bias_sums = new_x_bias_sums + (x_bias_sums[chunk] + gradient,)
        weight_sums, bias_sums, x_bias_sums = new_weight_sums, new_bias_sums, new_x_bias_sums
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        place = partial_ptr + program * SUMS * WIDTH + columns
        column_mask = columns < WIDTH
        tl.store(place, tl.sum(weight_sums[chunk], axis=0), mask=column_mask)
        tl.store(place + WIDTH, tl.sum(bias_sums[chunk], axis=0), mask=column_mask)
        if SUMS == 3:
            tl.store(place + 2 * WIDTH, tl.sum(x_bias_sums[chunk], axis=0), mask=column_mask)


@triton.jit
def _piece_of_wide_row(
    dy_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr,
    dy_offset, x_offset, residual_offset,
    columns, first_column, row_mask, mean, rstd, key, sequence, position,
    WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, X_IS_TOTAL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    mask = _column_mask(columns, row_mask, WIDTH, CHUNK)
    keep = None
    if key is not None:
        keep = keep_factors(key, sequence, position, first_column, CHUNK, THRESHOLD, SCALE)
    ROWS: tl.constexpr = mean.shape[0]
    x_bias = None
    if x_bias_ptr is not None:
        x_bias = parameter_tile(x_bias_ptr, columns, ROWS, WIDTH, CHUNK)
    total = _sum_of_parts(
        x_ptr, x_bias, residual_ptr, x_offset, residual_offset,
        columns, mask, None if X_IS_TOTAL else keep,
    )  # fmt: skip
    dy = tl.load(dy_ptr + dy_offset[:, None] + columns[None, :], mask=mask, other=0.0)
    weight = parameter_tile(weight_ptr, columns, ROWS, WIDTH, CHUNK)
    normed = (total - mean[:, None]) * rstd[:, None]
    return dy.to(tl.float32), weight, normed, keep, mask


# rows too wide to lie in registers beside those sums: one program owns CHUNK columns of its rows.
# It walks a whole row for the two means, which its neighbours do as well, then reads its own
# columns and draws their mask again
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _layer_norm_wide_bwd_kernel(
    dy_ptr, dtotal_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, partial_ptr,
    state_ptr, sequence_ids_ptr, positions_ptr,
    dy_row_stride, dtotal_row_stride, x_row_stride, residual_row_stride,
    rows, blocks_per_program, layer, site,
    WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, X_IS_TOTAL: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    own_first = tl.program_id(0) * CHUNK
    own_columns = own_first + tl.arange(0, CHUNK)
    weight_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    bias_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    x_bias_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    key = None
    if state_ptr is not None:
        key = subkey(state_ptr, layer, site)
    for block in range(0, blocks_per_program):
        row = (block * tl.num_programs(1) + program) * ROWS + tl.arange(0, ROWS)
        row_mask = row < rows
        wide_row = row.to(tl.int64)
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        sequence, position = None, None
        if state_ptr is not None:
            sequence, position = row_coordinates(
                state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask
            )
        scaled_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        product_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        for first in range(0, CHUNKS * CHUNK, CHUNK):
            dy, weight, normed, _keep, _mask = _piece_of_wide_row(
                dy_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr,
                wide_row * dy_row_stride, wide_row * x_row_stride, wide_row * residual_row_stride,
                first + tl.arange(0, CHUNK), first, row_mask, mean, rstd, key, sequence, position,
                WIDTH, THRESHOLD, SCALE, X_IS_TOTAL, CHUNK,
            )  # fmt: skip
            scaled_sum += dy * weight
            product_sum += dy * weight * normed
        dy, weight, normed, keep, mask = _piece_of_wide_row(
            dy_ptr, x_ptr, x_bias_ptr, residual_ptr, weight_ptr,
            wide_row * dy_row_stride, wide_row * x_row_stride, wide_row * residual_row_stride,
            own_columns, own_first, row_mask, mean, rstd, key, sequence, position,
            WIDTH, THRESHOLD, SCALE, X_IS_TOTAL, CHUNK,
        )  # fmt: skip
        gradient = dy * weight - (tl.sum(scaled_sum, axis=1) / WIDTH)[:, None]
        gradient -= normed * (tl.sum(product_sum, axis=1) / WIDTH)[:, None]
        gradient *= rstd[:, None]
        if dtotal_ptr is not None:
            gradient += tl.load(
                dtotal_ptr + wide_row[:, None] * dtotal_row_stride + own_columns[None, :],
                mask=mask, other=0.0,
            ).to(tl.float32)  # fmt: skip
        place = wide_row[:, None] * WIDTH + own_columns[None, :]
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + place, gradient, mask=mask)
        if state_ptr is not None:
            gradient *= keep
        tl.store(dx_ptr + place, gradient, mask=mask)
        weight_sum += dy * normed
        bias_sum += dy
        x_bias_sum += tl.where(mask, gradient, 0.0)
    place = partial_ptr + program * SUMS * WIDTH + own_columns
    column_mask = own_columns < WIDTH
    tl.store(place, tl.sum(weight_sum, axis=0), mask=column_mask)
    tl.store(place + WIDTH, tl.sum(bias_sum, axis=0), mask=column_mask)
    if SUMS == 3:
        tl.store(place + 2 * WIDTH, tl.sum(x_bias_sum, axis=0), mask=column_mask)


def layer_norm_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    state: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype,
    wants_total: bool,
    wants_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total [rows, width] in `dtype`, mean and rstd [rows] fp32; empty where not wanted."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=dtype, device=x.device)
    total = torch.empty((rows if wants_total else 0, width), dtype=dtype, device=x.device)
    statistics = rows if wants_statistics else 0
    mean = torch.empty(statistics, dtype=torch.float32, device=x.device)
    rstd = torch.empty(statistics, dtype=torch.float32, device=x.device)
    if rows == 0:
        return y, total, mean, rstd
    chosen = launch.configure("layer_norm_fwd", x, width)
    launch.run(
        _layer_norm_fwd_kernel,
        (triton.cdiv(rows, chosen.rows),),
        x, x_bias, residual, weight, bias,
        y, total if wants_total else None,
        mean if wants_statistics else None, rstd if wants_statistics else None,
        state, sequence_ids, positions,
        x.stride(0), residual.stride(0) if residual is not None else 0,
        rows, layer, site,
        launch=chosen,
        WIDTH=width, EPS=eps, THRESHOLD=keep_threshold(dropout_p), SCALE=keep_scale(dropout_p),
        ROWS=chosen.rows, CHUNK=chosen.columns, CHUNKS=triton.cdiv(width, chosen.columns),
    )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
    x_is_total: bool,
    wants_x_bias: bool,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dresidual [rows, width], and [2 or 3, width] fp32: dweight, dbias, dx_bias.

    dresidual is empty where `dresidual_dtype` is None: it is not wanted, or equal to dx.
    """
    rows, width = x.shape
    sums = 3 if wants_x_bias else 2
    dx = torch.empty((rows, width), dtype=dx_dtype, device=x.device)
    separate = dresidual_dtype is not None
    dresidual = torch.empty(
        (rows if separate else 0, width), dtype=dresidual_dtype or dx_dtype, device=x.device
    )
    if rows == 0:
        return dx, dresidual, dx.new_zeros((sums, width), dtype=torch.float32)
    chosen = launch.configure("layer_norm_bwd", x, width)
    chunks = triton.cdiv(width, chosen.columns)
    blocks = triton.cdiv(rows, chosen.rows)
    programs = launch.programs(x, chosen, blocks)
    wide = width > launch.HELD_WIDTH
    partial = torch.empty((programs, sums * width), dtype=torch.float32, device=x.device)
    launch.run(
        _layer_norm_wide_bwd_kernel if wide else _layer_norm_bwd_kernel,
        (chunks, programs) if wide else (programs,),
        dy, dtotal, x, x_bias, residual, weight, mean, rstd,
        dx, dresidual if separate else None, partial,
        state, sequence_ids, positions,
        dy.stride(0), dtotal.stride(0) if dtotal is not None else 0,
        x.stride(0), residual.stride(0) if residual is not None else 0,
        rows, triton.cdiv(blocks, programs), layer, site,
        launch=chosen,
        WIDTH=width, THRESHOLD=keep_threshold(dropout_p), SCALE=keep_scale(dropout_p),
        X_IS_TOTAL=x_is_total, SUMS=sums,
        ROWS=chosen.rows, CHUNK=chosen.columns, CHUNKS=chunks,
        **({} if wide else {"STAGES": chosen.num_stages}),
    )  # fmt: skip
    return dx, dresidual, column_sum(partial).view(sums, width)
