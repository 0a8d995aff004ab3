"""What attention's kernels share: which rows a tile has, which keys they see, loads and scores.

attention.py says what a tile is. All of this is inlined into the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels.philox import SCORE_BITS, keep_scale, keep_threshold

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# below every score, and finite: a row that has seen no key yet makes no NaN
LOWEST: tl.constexpr = tl.constexpr(-1e30)
FAR: tl.constexpr = tl.constexpr(2147483647)

UNSPECIALISED = ["tokens", "layer", "site"]


@triton.jit
def tile_of(tiles_ptr, tokens, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head, first row and the row behind the last; heads go fastest, for rows are read whole."""
    tile = tl.program_id(0) // HEADS
    if tiles_ptr is None:
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, tokens)
    else:
        first = tl.load(tiles_ptr + tile)
        last = tl.load(tiles_ptr + tile + 1)
    return tl.program_id(0) % HEADS, first, last


@triton.jit
def seen(starts_ptr, ends_ptr, row, row_mask, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The range [low, high) that each row sees; empty in rows of no sequence."""
    low = tl.load(starts_ptr + row, mask=row_mask, other=0)
    high = tl.load(ends_ptr + row, mask=row_mask, other=0)
    if BEFORE is not None:
        low = tl.maximum(low, row - BEFORE)
        high = tl.minimum(high, row + AFTER + 1)
    return low, high


@triton.jit
def walk(low, high, BLOCK_N: tl.constexpr):
    """The blocks a tile visits: `edges` masked ones, of which `left` come first, and `inner` ones.

    Also returns where the first block begins, where the inner ones do, and the end of all.
    """
    real = low < high
    first = tl.min(tl.where(real, low, FAR), axis=0)
    last = tl.max(tl.where(real, high, 0), axis=0)
    first = tl.minimum(first, last)
    left = tl.cdiv(tl.maximum(tl.max(tl.where(real, low, 0), axis=0) - first, 0), BLOCK_N)
    inner_first = first + left * BLOCK_N
    shared = tl.min(tl.where(real, high, FAR), axis=0) - inner_first
    inner = tl.minimum(tl.maximum(shared, 0), tl.maximum(last - inner_first, 0)) // BLOCK_N
    right = tl.cdiv(tl.maximum(last - inner_first - inner * BLOCK_N, 0), BLOCK_N)
    return first, inner_first, last, left, inner, left + right


@triton.jit
def edge(number, first, inner_first, left, inner, BLOCK_N: tl.constexpr):
    """Where a masked block begins: they lie on both sides of the inner ones."""
    behind = inner_first + (inner + number - left) * BLOCK_N
    return tl.where(number < left, first + number * BLOCK_N, behind)


@triton.jit
def visible(column, low, high):
    # one comparison: what lies before `low` is large as an unsigned number
    span = tl.maximum(high - low, 0).to(tl.uint32)
    return (column[None, :] - low[:, None]).to(tl.uint32) < span[:, None]


@triton.jit
def load_tile(
    base, first, stride, row_mask,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] from row `first` on, zeros in rows that are masked out."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    # rows may be far apart, the elements of one tile are not
    place = base + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if row_mask is not None and HEAD_DIM != BLOCK_D:
        mask = row_mask[:, None] & (column < HEAD_DIM)[None, :]
        tile = tl.load(place, mask=mask, other=0.0)
    elif row_mask is not None:
        tile = tl.load(place, mask=row_mask[:, None], other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(place, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def store_tile(
    base, first, stride, row_mask, values,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    place = base + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if HEAD_DIM != BLOCK_D:
        mask = row_mask[:, None] & (column < HEAD_DIM)[None, :]
    else:
        mask = row_mask[:, None]
    tl.store(place, values, mask=mask)


@triton.jit
def exponents(products, row, column, slope, SCALE: tl.constexpr):
    """Scores as powers of two."""
    scores = products * (SCALE * LOG2_E)
    if slope is not None:
        scores -= slope * tl.abs(row[:, None] - column[None, :]).to(tl.float32)
    return scores


@triton.jit
def load_words(place, mask):
    """Dropout's words, made by attention_words.py, where tokens are not masked out."""
    word = tl.load(place) if mask is None else tl.load(place, mask=mask, other=0)
    return word.to(tl.uint32, bitcast=True)


def constants_of(
    query: Tensor, softmax_scale: float, before: int | None, after: int | None, dropout_p: float
) -> dict[str, object]:
    _, heads, head_dim = query.shape
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "SCALE": softmax_scale,
        "BEFORE": before,
        "AFTER": after,
        "THRESHOLD": keep_threshold(dropout_p, SCORE_BITS),
        "KEEP_SCALE": keep_scale(dropout_p, SCORE_BITS),
        "PRECISION": launch.product_precision(),
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
