"""y = dropout(LayerNorm(word[id] + position[p] + segment[s])), one pass over the tokens.

    dtotal as in layer_norm.py, from dy under the mask of the forward pass
    dtable[k] = sum of dtotal over the tokens that took row k, for each of the three tables

Saved for backward: the ids, and the fp32 mean and rstd of each row. Recomputed: the sum, the mask
and xhat. The three tables count as one of words + positions + segments rows: backward writes each
token's three rows of it as keys, and keyed_sum.py adds up. Rows past the last sequence read no ids,
become zeros and take no part in any gradient; an id that its table has not makes the row NaN, where
a host would raise.
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
from fastbert.kernels.keyed_sum import sum_by_key
from fastbert.kernels.layer_norm import parameter_row, parameter_tile
from fastbert.kernels.philox import keep_scale, keep_threshold

_UNSPECIALISED = ["tokens", "sequences", "layer", "site", "blocks_per_program"]


@triton.jit
def _live_rows(row, tokens, cu_seqlens_ptr, sequences):
    """Rows that belong to a sequence; all of them where there are no bounds."""
    live = row < tokens
    if cu_seqlens_ptr is not None:
        live = live & (row < tl.load(cu_seqlens_ptr + sequences))
    return live


@triton.jit
def _ids(ids_ptr, row, live, size):
    """The rows' ids, and whether the table has them."""
    ids = tl.load(ids_ptr + row, mask=live, other=0).to(tl.int64)
    return ids, live & (ids >= 0) & (ids < size)


@triton.jit
def _looked_up(table_ptr, ids, known, columns, column_mask, WIDTH: tl.constexpr):
    place = table_ptr + ids[:, None] * WIDTH + columns[None, :]
    return tl.load(place, mask=known[:, None] & column_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _total(
    word_ptr, position_ptr, segment_ptr, word, position, segment, known, columns,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum of the three tables' rows, in fp32, at these columns."""
    total = _looked_up(word_ptr, word, known, columns, columns < WIDTH, WIDTH)
    total += _looked_up(position_ptr, position, known, columns, columns < WIDTH, WIDTH)
    total += _looked_up(segment_ptr, segment, known, columns, columns < WIDTH, WIDTH)
    return total


# one program embeds ROWS tokens; a row lies in registers as CHUNKS pieces of CHUNK columns
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _embedding_fwd_kernel(
    word_ptr, position_ptr, segment_ptr, weight_ptr, bias_ptr,
    word_ids_ptr, position_ids_ptr, segment_ids_ptr, cu_seqlens_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    state_ptr, sequence_ids_ptr, positions_ptr,
    tokens, sequences, layer, site,
    WORDS: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr, EPS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < tokens
    live = _live_rows(row, tokens, cu_seqlens_ptr, sequences)
    word, word_known = _ids(word_ids_ptr, row, live, WORDS)
    position, position_known = _ids(position_ids_ptr, row, live, POSITIONS)
    segment, segment_known = _ids(segment_ids_ptr, row, live, SEGMENTS)
    known = word_known & position_known & segment_known
    if state_ptr is not None:
        key = subkey(state_ptr, layer, site)
        sequence, place = row_coordinates(state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask)
    pieces = ()
    # chunks are added up first, so that threads exchange sums once a row
    chunk_sum = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        piece = _total(
            word_ptr, position_ptr, segment_ptr, word, position, segment, known, columns, WIDTH
        )
        chunk_sum += piece
        pieces = pieces + (piece,)
    mean = tl.sum(chunk_sum, axis=1) / WIDTH
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        centred = pieces[chunk] - mean[:, None]
        if WIDTH % CHUNK != 0:
            centred = tl.where((columns < WIDTH)[None, :], centred, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + EPS)
    rstd = tl.where(live & (known == 0), float("nan"), rstd)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_mask)
        tl.store(rstd_ptr + row, rstd, mask=row_mask)
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        weight = parameter_tile(weight_ptr, columns, ROWS, WIDTH, CHUNK)
        bias = parameter_tile(bias_ptr, columns, ROWS, WIDTH, CHUNK)
        y = (pieces[chunk] - mean[:, None]) * rstd[:, None] * weight + bias
        if state_ptr is not None:
            y *= keep_factors(key, sequence, place, chunk * CHUNK, CHUNK, THRESHOLD, SCALE)
        y = tl.where(live[:, None], y, 0.0)
        mask = row_mask[:, None] & (columns < WIDTH)[None, :]
        tl.store(y_ptr + row.to(tl.int64)[:, None] * WIDTH + columns[None, :], y, mask=mask)


# one program walks blocks of ROWS tokens, a fixed stride apart, and keeps its share of the norm's
# gradients in registers until the end where these are HELD, else in its row of memory
@triton.jit(do_not_specialize=_UNSPECIALISED)
def _embedding_bwd_kernel(
    dy_ptr, word_ptr, position_ptr, segment_ptr, weight_ptr,
    word_ids_ptr, position_ids_ptr, segment_ids_ptr, cu_seqlens_ptr, mean_ptr, rstd_ptr,
    dtotal_ptr, keys_ptr, partial_ptr,
    state_ptr, sequence_ids_ptr, positions_ptr,
    dy_row_stride,
    tokens, sequences, blocks_per_program, layer, site,
    WORDS: tl.constexpr, POSITIONS: tl.constexpr, SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    LIMIT: tl.constexpr = WORDS + POSITIONS + SEGMENTS
    program = tl.program_id(0)
    weight_sums, bias_sums, weights = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        weights = weights + (parameter_row(weight_ptr, columns, WIDTH),)
    if HELD:
        for _ in tl.static_range(CHUNKS):
            weight_sums = weight_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
            bias_sums = bias_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    if state_ptr is not None:
        key = subkey(state_ptr, layer, site)
    for block in range(0, blocks_per_program):
        row = (block * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
        row_mask = row < tokens
        live = _live_rows(row, tokens, cu_seqlens_ptr, sequences)
        word, word_known = _ids(word_ids_ptr, row, live, WORDS)
        position, position_known = _ids(position_ids_ptr, row, live, POSITIONS)
        segment, segment_known = _ids(segment_ids_ptr, row, live, SEGMENTS)
        known = word_known & position_known & segment_known
        # keys past all tables sort behind them
        key_place = keys_ptr + row
        tl.store(key_place, tl.where(known, word, LIMIT), mask=row_mask)
        position_key = tl.where(known, WORDS + position, LIMIT)
        tl.store(key_place + tokens, position_key, mask=row_mask)
        segment_key = tl.where(known, WORDS + POSITIONS + segment, LIMIT)
        tl.store(key_place + 2 * tokens, segment_key, mask=row_mask)
        mean = tl.load(mean_ptr + row, mask=known, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=known, other=0.0)
        if state_ptr is not None:
            sequence, place = row_coordinates(
                state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask
            )
        normed_pieces, scaled_pieces = (), ()
        new_weight_sums, new_bias_sums = (), ()
        scaled_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        product_sum = tl.zeros([ROWS, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            dy = tl.load(
                dy_ptr + row.to(tl.int64)[:, None] * dy_row_stride + columns[None, :],
                mask=known[:, None] & (columns < WIDTH)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            if state_ptr is not None:
                dy *= keep_factors(key, sequence, place, chunk * CHUNK, CHUNK, THRESHOLD, SCALE)
            total = _total(
                word_ptr, position_ptr, segment_ptr, word, position, segment, known, columns, WIDTH
            )
            normed = (total - mean[:, None]) * rstd[:, None]
            scaled = dy * weights[chunk]
            scaled_sum += scaled
            product_sum += scaled * normed
            if HELD:
                new_weight_sums = new_weight_sums + (weight_sums[chunk] + dy * normed,)
                new_bias_sums = new_bias_sums + (bias_sums[chunk] + dy,)
            else:
                # the barriers of the row sums lie between this store and the next block's load
                at = partial_ptr + program * 2 * WIDTH + columns
                later = (columns < WIDTH) & (block > 0)
                weight_sum = tl.load(at, mask=later, other=0.0) + tl.sum(dy * normed, axis=0)
                bias_sum = tl.load(at + WIDTH, mask=later, other=0.0) + tl.sum(dy, axis=0)
                tl.store(at, weight_sum, mask=columns < WIDTH)
                tl.store(at + WIDTH, bias_sum, mask=columns < WIDTH)
            normed_pieces = normed_pieces + (normed,)
            scaled_pieces = scaled_pieces + (scaled,)
        scaled_mean = tl.sum(scaled_sum, axis=1) / WIDTH
        product_mean = tl.sum(product_sum, axis=1) / WIDTH
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            gradient = scaled_pieces[chunk] - scaled_mean[:, None]
            gradient -= normed_pieces[chunk] * product_mean[:, None]
            gradient *= rstd[:, None]
            mask = known[:, None] & (columns < WIDTH)[None, :]
            store_at = dtotal_ptr + row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            tl.store(store_at, gradient, mask=mask)
        weight_sums, bias_sums = new_weight_sums, new_bias_sums
    if HELD:
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            at = partial_ptr + program * 2 * WIDTH + columns
            tl.store(at, tl.sum(weight_sums[chunk], axis=0), mask=columns < WIDTH)
            tl.store(at + WIDTH, tl.sum(bias_sums[chunk], axis=0), mask=columns < WIDTH)


def embedding_fwd(
    word_weight: Tensor,
    position_weight: Tensor,
    segment_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    word_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype,
    wants_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [tokens, width] in `dtype`, mean and rstd [tokens] fp32, empty where not wanted."""
    tokens, width = word_ids.shape[0], word_weight.shape[1]
    y = torch.empty((tokens, width), dtype=dtype, device=word_weight.device)
    statistics = tokens if wants_statistics else 0
    mean = torch.empty(statistics, dtype=torch.float32, device=word_weight.device)
    rstd = torch.empty(statistics, dtype=torch.float32, device=word_weight.device)
    if tokens == 0:
        return y, mean, rstd
    chosen = launch.configure("embedding_fwd", y, width)
    launch.run(
        _embedding_fwd_kernel,
        (triton.cdiv(tokens, chosen.rows),),
        word_weight, position_weight, segment_weight, norm_weight, norm_bias,
        word_ids, position_ids, segment_ids, cu_seqlens,
        y, mean if wants_statistics else None, rstd if wants_statistics else None,
        state, sequence_ids, positions,
        tokens, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, layer, site,
        launch=chosen,
        WORDS=word_weight.shape[0], POSITIONS=position_weight.shape[0],
        SEGMENTS=segment_weight.shape[0], WIDTH=width, EPS=eps,
        THRESHOLD=keep_threshold(dropout_p), SCALE=keep_scale(dropout_p),
        ROWS=chosen.rows, CHUNK=chosen.columns, CHUNKS=triton.cdiv(width, chosen.columns),
    )  # fmt: skip
    return y, mean, rstd


def embedding_bwd(
    dy: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    segment_weight: Tensor,
    norm_weight: Tensor,
    word_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    cu_seqlens: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor | None,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The three tables' gradients one below the other, and [2, width]: dweight, dbias; fp32."""
    tokens, width = dy.shape
    words, places, segments = (
        table.shape[0] for table in (word_weight, position_weight, segment_weight)
    )
    device = dy.device
    if tokens == 0:
        rows = words + places + segments
        return dy.new_zeros((rows, width), dtype=torch.float32), dy.new_zeros(
            (2, width), dtype=torch.float32
        )
    chosen = launch.configure("embedding_bwd", dy, width)
    blocks = triton.cdiv(tokens, chosen.rows)
    programs = launch.programs(dy, chosen, blocks)
    dtotal = torch.empty((tokens, width), dtype=torch.float32, device=device)
    keys = torch.empty(3 * tokens, dtype=torch.int32, device=device)
    partial = torch.empty((programs, 2 * width), dtype=torch.float32, device=device)
    launch.run(
        _embedding_bwd_kernel,
        (programs,),
        dy, word_weight, position_weight, segment_weight, norm_weight,
        word_ids, position_ids, segment_ids, cu_seqlens, mean, rstd,
        dtotal, keys, partial,
        state, sequence_ids, positions,
        dy.stride(0),
        tokens, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        triton.cdiv(blocks, programs), layer, site,
        launch=chosen,
        WORDS=words, POSITIONS=places, SEGMENTS=segments, WIDTH=width,
        THRESHOLD=keep_threshold(dropout_p), SCALE=keep_scale(dropout_p),
        ROWS=chosen.rows, CHUNK=chosen.columns, CHUNKS=triton.cdiv(width, chosen.columns),
        HELD=width <= launch.HELD_WIDTH,
    )  # fmt: skip
    dtables = sum_by_key(dtotal, keys, words + places + segments)
    return dtables, column_sum(partial).view(2, width)
