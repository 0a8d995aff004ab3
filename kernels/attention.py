"""Attention within the sequences of a packed stream, by flat tiles: softmax(scale q k' + bias) v.

A tile is BLOCK_M neighbouring rows of the stream, whatever sequences they belong to. Row i sees
keys [low i, high i): its own sequence, or the window's part of it. The tile walks blocks of keys
from the least low to the largest high; blocks that every row sees whole need no mask. Where all
sequences are short, tiles are cut at their boundaries: one program owns its sequences whole.

    s = scale q k' + bias;  lse = log sum exp s;  p = exp(s - lse);  out = (p * keep) v
    dv = (p * keep)' dout;  dp = keep * (dout v');  delta = sum(dout * out) - dlse
    ds = p * (dp - delta);  dq = scale ds k;  dk = scale ds' q

Saved for backward: query, key, value, out and lse. Recomputed: s, p and the dropout mask. No
atomics. Rows past the last sequence are zero and read nothing, so that they may hold NaN. A NaN or
Inf inside a sequence spoils that sequence, and of its neighbours at most those that lie in a tile
or a key block with it (0 * NaN is NaN in a product); no sequence further away sees it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import attention_launch, launch
from fastbert.kernels.attention_tiles import (
    LOG2_E,
    LOWEST,
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
def _attend(
    total, weight, peak, query, key_base, value_base, row, low, high, first, last, slope,
    row_words, column_words_base,
    key_row_stride, value_row_stride, MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running sums of the rows."""
    column = first + tl.arange(0, BLOCK_N)
    inside = None
    if MASKED:
        inside = column < last
    key = load_tile(key_base, first, key_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores = exponents(products, row, column, slope, SCALE)
    if MASKED:
        scores = tl.where(visible(column, low, high), scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    share = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    weight = weight * shrink + tl.sum(share, axis=1)
    if row_words is not None:
        column_words = load_words(column_words_base + column, inside)
        share = tl.where(keep_scores(row_words, column_words, THRESHOLD), share, 0.0)
    value = load_tile(value_base, first, value_row_stride, inside, HEAD_DIM, BLOCK_N, BLOCK_D)
    total = tl.dot(share.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
    return total, weight, new_peak


# one program makes the output of one tile and head
@triton.jit(do_not_specialize=UNSPECIALISED)
def _attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr,
    starts_ptr, ends_ptr, tiles_ptr, slopes_ptr,
    words_ptr, state_ptr,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride,
    value_row_stride, value_head_stride,
    tokens, layer, site,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SCALE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, first_row, last_row = tile_of(tiles_ptr, tokens, HEADS, BLOCK_M)
    if first_row >= last_row:
        return
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
    key_base = key_ptr + wide_head * key_head_stride
    value_base = value_ptr + wide_head * value_head_stride
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32) + LOWEST
    for number in range(0, inner):
        total, weight, peak = _attend(
            total, weight, peak, query, key_base, value_base, row, low, high,
            inner_first + number * BLOCK_N, last, slope,
            row_words, column_words_base,
            key_row_stride, value_row_stride, False,
            HEAD_DIM, SCALE, THRESHOLD, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for number in range(0, edges):
        total, weight, peak = _attend(
            total, weight, peak, query, key_base, value_base, row, low, high,
            edge(number, first, inner_first, left, inner, BLOCK_N), last, slope,
            row_words, column_words_base,
            key_row_stride, value_row_stride, True,
            HEAD_DIM, SCALE, THRESHOLD, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    factor = KEEP_SCALE / tl.where(real, weight, 1.0)
    total = tl.where(real[:, None], total * factor[:, None], 0.0)
    out_base = out_ptr + head * HEAD_DIM
    store_tile(out_base, first_row, HEADS * HEAD_DIM, row_mask, total, HEAD_DIM, BLOCK_M, BLOCK_D)
    # to base two, as the backward pass wants it: every further rounding would scale a whole row
    lse = tl.where(real, peak + tl.log2(tl.where(real, weight, 1.0)), float("-inf"))
    tl.store(lse_ptr + wide_head * tokens + row, lse, mask=row_mask)


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Output [tokens, heads, head_dim], and lse to base two, [heads, tokens] fp32.

    `block` is that of `tiles`.
    """
    tokens, heads, head_dim = query.shape
    out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, lse
    name = "attention_fwd" if tiles is None else f"attention_fwd_owned_{block}"
    chosen = attention_launch.configure(name, query, head_dim)
    if chosen is None:
        tiles, chosen = None, attention_launch.required("attention_fwd", query, head_dim)
    count = triton.cdiv(tokens, chosen.rows) if tiles is None else len(tiles) - 1
    launch.run(
        _attention_fwd_kernel,
        (count * heads,),
        query, key, value, out, lse,
        starts, ends, tiles, alibi_slopes,
        words, state,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1),
        tokens, layer, site,
        launch=chosen,
        **constants_of(query, softmax_scale, before, after, dropout_p),
        BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
    )  # fmt: skip
    return out, lse
