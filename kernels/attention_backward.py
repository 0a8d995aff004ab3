"""Attention's gradients; attention.py has the maths and what is saved.

Flat tiles take two passes: the gradient of the rows as queries, then as keys and values. Tiles that
own their sequences make all three from one recomputation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import attention_launch, launch
from fastbert.kernels.attention_tiles import (
    LOG2_E,
    UNSPECIALISED,
    constants_of,
    edge,
    exponents,
    load_tile,
    load_words,
    seen,
    store_tile,
    tile_of,
    visible,
    walk,
)
from fastbert.kernels.dropout import keep_scores, layer_word


@triton.jit
def _delta(
    dlse_ptr, out_ptr, dout, head, first_row, row, real, dlse_head_stride, dlse_row_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sum(dout * out) - dlse of each row."""
    out_base = out_ptr + head * HEAD_DIM
    out = load_tile(out_base, first_row, HEADS * HEAD_DIM, real, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        place = head.to(tl.int64) * dlse_head_stride + row.to(tl.int64) * dlse_row_stride
        delta -= tl.load(dlse_ptr + place, mask=real, other=0.0) * LOG2_E
    return delta


@triton.jit
def _query_gradient(
    dquery, query, dout, lse, delta, key_base, value_base, row, low, high, first, last, slope,
    row_words, column_words_base,
    key_row_stride, value_row_stride, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the gradient of the rows as queries."""
    column = first + tl.arange(0, BLOCK_N)
    inside = None
    if MASKED:
        inside = column < last
    key = load_tile(key_base, first, key_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    share = tl.exp2(exponents(products, row, column, slope, SCALE) - lse[:, None])
    value = load_tile(value_base, first, value_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    dshare = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
    if row_words is not None:
        column_words = load_words(column_words_base + column, inside)
        dshare = tl.where(keep_scores(row_words, column_words, THRESHOLD), dshare * KEEP_SCALE, 0.0)
    dscores = share * (dshare - delta[:, None])
    if MASKED:
        dscores = tl.where(visible(column, low, high), dscores, 0.0)
    return tl.dot(dscores.to(key.dtype), key, dquery, input_precision=PRECISION)


# one program makes the gradient of one tile and head as queries, and what the next kernel needs
@triton.jit(do_not_specialize=UNSPECIALISED)
def _attention_bwd_query_kernel(
    dout_ptr, dlse_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    starts_ptr, ends_ptr, slopes_ptr,
    words_ptr, state_ptr,
    dout_row_stride, dout_head_stride, dlse_head_stride, dlse_row_stride,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride,
    value_row_stride, value_head_stride,
    tokens, layer, site,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, first_row, last_row = tile_of(None, tokens, HEADS, BLOCK_M)
    wide_head = head.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < last_row
    low, high = seen(starts_ptr, ends_ptr, row, row_mask, BEFORE, AFTER)
    real = low < high
    first, inner_first, last, left, inner, edges = walk(low, high, BLOCK_N)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head) * LOG2_E
    row_words, column_words_base = None, None
    if words_ptr is not None:
        row_words_base, column_words_base = words_ptr, words_ptr + HEADS * tokens
        row_words = load_words(row_words_base + wide_head * tokens + row, row_mask)
        row_words ^= layer_word(state_ptr, layer, site)
        column_words_base += wide_head * tokens
    query = load_tile(
        query_ptr + wide_head * query_head_stride, first_row, query_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dout = load_tile(
        dout_ptr + wide_head * dout_head_stride, first_row, dout_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    delta = _delta(
        dlse_ptr, out_ptr, dout, head, first_row, row, real,
        dlse_head_stride, dlse_row_stride, HEADS, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    tl.store(delta_ptr + wide_head * tokens + row, delta, mask=row_mask)
    lse = tl.load(lse_ptr + wide_head * tokens + row, mask=real, other=0.0)
    key_base = key_ptr + wide_head * key_head_stride
    value_base = value_ptr + wide_head * value_head_stride
    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for number in range(0, inner):
        dquery = _query_gradient(
            dquery, query, dout, lse, delta, key_base, value_base, row, low, high,
            inner_first + number * BLOCK_N, last, slope,
            row_words, column_words_base,
            key_row_stride, value_row_stride, False,
            HEAD_DIM, SCALE, THRESHOLD, KEEP_SCALE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for number in range(0, edges):
        dquery = _query_gradient(
            dquery, query, dout, lse, delta, key_base, value_base, row, low, high,
            edge(number, first, inner_first, left, inner, BLOCK_N), last, slope,
            row_words, column_words_base,
            key_row_stride, value_row_stride, True,
            HEAD_DIM, SCALE, THRESHOLD, KEEP_SCALE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dquery = tl.where(real[:, None], dquery * SCALE, 0.0)
    base = dqkv_ptr + head * HEAD_DIM
    store_tile(base, first_row, 3 * HEADS * HEAD_DIM, row_mask, dquery, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _key_gradients(
    dkey, dvalue, key, value, query_base, dout_base, lse_base, delta_base,
    row, low, high, first, last, slope,
    row_words, column_words_base,
    query_row_stride, dout_row_stride, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries into the gradients of the rows as keys; scores lie transposed."""
    column = first + tl.arange(0, BLOCK_N)
    inside = None
    if MASKED:
        inside = column < last
    query = load_tile(query_base, first, query_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    if MASKED:
        lse = tl.load(lse_base + column, mask=inside, other=0.0)
        delta = tl.load(delta_base + column, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_base + column)
        delta = tl.load(delta_base + column)
    products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    share = tl.exp2(exponents(products, row, column, slope, SCALE) - lse[None, :])
    if MASKED:
        share = tl.where(visible(column, low, high), share, 0.0)
    dout = load_tile(dout_base, first, dout_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    dshare = tl.dot(value, tl.trans(dout), input_precision=PRECISION)
    kept = share
    if row_words is not None:
        column_words = load_words(column_words_base + column, inside)
        keep = keep_scores(row_words, column_words, THRESHOLD)
        kept = tl.where(keep, share, 0.0)
        dshare = tl.where(keep, dshare * KEEP_SCALE, 0.0)
    dvalue = tl.dot(kept.to(dout.dtype), dout, dvalue, input_precision=PRECISION)
    dscores = share * (dshare - delta[None, :])
    dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue


# one program makes the gradients of one tile and head as keys and values; the ranges of queries
# that see a key are those of keys that a query sees, with the window turned round
@triton.jit(do_not_specialize=UNSPECIALISED)
def _attention_bwd_key_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    starts_ptr, ends_ptr, slopes_ptr,
    words_ptr, state_ptr,
    dout_row_stride, dout_head_stride,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride,
    value_row_stride, value_head_stride,
    tokens, layer, site,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, first_row, last_row = tile_of(None, tokens, HEADS, BLOCK_M)
    wide_head = head.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < last_row
    low, high = seen(starts_ptr, ends_ptr, row, row_mask, AFTER, BEFORE)
    real = low < high
    first, inner_first, last, left, inner, edges = walk(low, high, BLOCK_N)
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head) * LOG2_E
    row_words, column_words_base = None, None
    if words_ptr is not None:
        row_words_base, column_words_base = words_ptr + HEADS * tokens, words_ptr
        row_words = load_words(row_words_base + wide_head * tokens + row, row_mask)
        row_words ^= layer_word(state_ptr, layer, site)
        column_words_base += wide_head * tokens
    key = load_tile(
        key_ptr + wide_head * key_head_stride, first_row, key_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    value = load_tile(
        value_ptr + wide_head * value_head_stride, first_row, value_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    query_base = query_ptr + wide_head * query_head_stride
    dout_base = dout_ptr + wide_head * dout_head_stride
    lse_base, delta_base = lse_ptr + wide_head * tokens, delta_ptr + wide_head * tokens
    dkey = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for number in range(0, inner):
        dkey, dvalue = _key_gradients(
            dkey, dvalue, key, value, query_base, dout_base, lse_base, delta_base,
            row, low, high, inner_first + number * BLOCK_N, last, slope,
            row_words, column_words_base,
            query_row_stride, dout_row_stride, False,
            HEAD_DIM, SCALE, THRESHOLD, KEEP_SCALE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for number in range(0, edges):
        dkey, dvalue = _key_gradients(
            dkey, dvalue, key, value, query_base, dout_base, lse_base, delta_base,
            row, low, high, edge(number, first, inner_first, left, inner, BLOCK_N), last, slope,
            row_words, column_words_base,
            query_row_stride, dout_row_stride, True,
            HEAD_DIM, SCALE, THRESHOLD, KEEP_SCALE, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dkey = tl.where(real[:, None], dkey * SCALE, 0.0)
    dvalue = tl.where(real[:, None], dvalue * KEEP_SCALE, 0.0)
    stride = 3 * HEADS * HEAD_DIM
    base = dqkv_ptr + (HEADS + head) * HEAD_DIM
    store_tile(base, first_row, stride, row_mask, dkey, HEAD_DIM, BLOCK_M, BLOCK_D)
    base = dqkv_ptr + (2 * HEADS + head) * HEAD_DIM
    store_tile(base, first_row, stride, row_mask, dvalue, HEAD_DIM, BLOCK_M, BLOCK_D)


# one program owns the sequences of its tile whole: all three gradients from one recomputation
@triton.jit(do_not_specialize=UNSPECIALISED)
def _attention_bwd_owned_kernel(
    dout_ptr, dlse_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, dqkv_ptr,
    starts_ptr, ends_ptr, tiles_ptr, slopes_ptr,
    words_ptr, state_ptr,
    dout_row_stride, dout_head_stride, dlse_head_stride, dlse_row_stride,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride,
    value_row_stride, value_head_stride,
    tokens, layer, site,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, first_row, last_row = tile_of(tiles_ptr, tokens, HEADS, BLOCK_M)
    if first_row >= last_row:
        return
    wide_head = head.to(tl.int64)
    row = first_row + tl.arange(0, BLOCK_M)
    row_mask = row < last_row
    low, high = seen(starts_ptr, ends_ptr, row, row_mask, BEFORE, AFTER)
    real = low < high
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head) * LOG2_E
    query = load_tile(
        query_ptr + wide_head * query_head_stride, first_row, query_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    key = load_tile(
        key_ptr + wide_head * key_head_stride, first_row, key_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + wide_head * tokens + row, mask=real, other=0.0)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    share = tl.exp2(exponents(products, row, row, slope, SCALE) - lse[:, None])
    share = tl.where(visible(row, low, high), share, 0.0)
    dout = load_tile(
        dout_ptr + wide_head * dout_head_stride, first_row, dout_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    value = load_tile(
        value_ptr + wide_head * value_head_stride, first_row, value_row_stride, real,
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    kept = share
    if words_ptr is not None:
        as_query = load_words(words_ptr + wide_head * tokens + row, row_mask)
        as_query ^= layer_word(state_ptr, layer, site)
        as_key = load_words(words_ptr + (HEADS + wide_head) * tokens + row, row_mask)
        keep = keep_scores(as_query, as_key, THRESHOLD)
        kept = tl.where(keep, share, 0.0)
    stride = 3 * HEADS * HEAD_DIM
    dvalue = tl.dot(tl.trans(kept.to(dout.dtype)), dout, input_precision=PRECISION)
    base = dqkv_ptr + (2 * HEADS + head) * HEAD_DIM
    store_tile(base, first_row, stride, row_mask, dvalue * KEEP_SCALE, HEAD_DIM, BLOCK_M, BLOCK_D)
    delta = _delta(
        dlse_ptr, out_ptr, dout, head, first_row, row, real,
        dlse_head_stride, dlse_row_stride, HEADS, HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dshare = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
    if words_ptr is not None:
        dshare = tl.where(keep, dshare * KEEP_SCALE, 0.0)
    dscores = (share * (dshare - delta[:, None]) * SCALE).to(query.dtype)
    dquery = tl.dot(dscores, key, input_precision=PRECISION)
    base = dqkv_ptr + head * HEAD_DIM
    store_tile(base, first_row, stride, row_mask, dquery, HEAD_DIM, BLOCK_M, BLOCK_D)
    dkey = tl.dot(tl.trans(dscores), query, input_precision=PRECISION)
    base = dqkv_ptr + (HEADS + head) * HEAD_DIM
    store_tile(base, first_row, stride, row_mask, dkey, HEAD_DIM, BLOCK_M, BLOCK_D)


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    tiles: Tensor | None,
    block: int,
    alibi_slopes: Tensor | None,
    before: int | None,
    after: int | None,
    softmax_scale: float,
    words: Tensor | None,
    state: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
) -> Tensor:
    """[tokens, 3, heads, head_dim]: the gradients of query, key and value."""
    tokens, heads, head_dim = query.shape
    dqkv = torch.empty((tokens, 3, heads, head_dim), dtype=query.dtype, device=query.device)
    if dqkv.numel() == 0:
        return dqkv
    constants = constants_of(query, softmax_scale, before, after, dropout_p)
    flow = (dout.stride(0), dout.stride(1))
    flow_lse = (0, 0) if dlse is None else (dlse.stride(0), dlse.stride(1))
    strides = tuple(t.stride(i) for t in (query, key, value) for i in (0, 1))
    draw = (words, state)
    owned = attention_launch.configure(f"attention_bwd_owned_{block}", query, head_dim)
    if tiles is not None and owned is not None:
        launch.run(
            _attention_bwd_owned_kernel,
            ((len(tiles) - 1) * heads,),
            dout, dlse, query, key, value, out, lse, dqkv,
            starts, ends, tiles, alibi_slopes, *draw,
            *flow, *flow_lse, *strides, tokens, layer, site,
            launch=owned, **constants, BLOCK_M=owned.rows,
        )  # fmt: skip
        return dqkv
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=query.device)
    chosen = attention_launch.required("attention_bwd_query", query, head_dim)
    launch.run(
        _attention_bwd_query_kernel,
        (triton.cdiv(tokens, chosen.rows) * heads,),
        dout, dlse, query, key, value, out, lse, delta, dqkv,
        starts, ends, alibi_slopes, *draw,
        *flow, *flow_lse, *strides, tokens, layer, site,
        launch=chosen, **constants, BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
    )  # fmt: skip
    chosen = attention_launch.required("attention_bwd_key", query, head_dim)
    launch.run(
        _attention_bwd_key_kernel,
        (triton.cdiv(tokens, chosen.rows) * heads,),
        dout, query, key, value, lse, delta, dqkv,
        starts, ends, alibi_slopes, *draw,
        *flow, *strides, tokens, layer, site,
        launch=chosen, **constants, BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
    )  # fmt: skip
    return dqkv
