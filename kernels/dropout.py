"""Dropout's random numbers as Triton device functions; philox.py is their exact twin.

    y = x keep, keep being 0 or 1 / (1 - p)

alone is a kernel too, for heads; its gradient is the same pass over dy. Saved for backward: nothing
but the names of the draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch, philox

ROUNDS: tl.constexpr = tl.constexpr(philox.ROUNDS)
COLUMNS_PER_CALL: tl.constexpr = tl.constexpr(philox.COLUMNS_PER_CALL)
HASH_A: tl.constexpr = tl.constexpr(philox.HASH_A)
HASH_B: tl.constexpr = tl.constexpr(philox.HASH_B)


@triton.jit
def subkey(state_ptr, layer, site):
    """The uint64 key of one layer's and call site's draw; `state` holds seed and step."""
    seed = tl.load(state_ptr)
    step = tl.load(state_ptr + 1).to(tl.int32)
    first, second, _, _ = tl.philox(
        seed, step, layer.to(tl.int32), site.to(tl.int32), tl.full([], 0, tl.int32), ROUNDS
    )
    return first.to(tl.uint64) | (second.to(tl.uint64) << 32)


@triton.jit
def row_coordinates(state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask):
    """Sequence id and position of each row, int32, as `philox.exact_mask` fills them in."""
    if sequence_ids_ptr is None:
        sequence = tl.zeros_like(row) + tl.load(state_ptr + 2)
    else:
        sequence = tl.load(sequence_ids_ptr + row, mask=row_mask, other=0)
    if positions_ptr is None:
        position = row
    else:
        position = tl.load(positions_ptr + row, mask=row_mask, other=0)
    return sequence.to(tl.int32), position.to(tl.int32)


@triton.jit
def keep_factors(
    key,
    sequence,
    position,
    first_column,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
):
    """[rows, COLUMNS] fp32, 0 or SCALE; `first_column` is a multiple of COLUMNS_PER_CALL."""
    groups = tl.arange(0, COLUMNS // COLUMNS_PER_CALL) + first_column // COLUMNS_PER_CALL
    zero = tl.zeros([sequence.shape[0], COLUMNS // COLUMNS_PER_CALL], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key,
        zero + groups[None, :],
        zero + position[:, None],
        zero + sequence[:, None],
        zero,
        ROUNDS,
    )
    # joined so that flattening runs through the words in order, each low half first
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    bits = tl.reshape(halves, [sequence.shape[0], COLUMNS])
    return tl.where(bits >= THRESHOLD, SCALE, 0.0)


@triton.jit
def layer_word(state_ptr, layer, site):
    """The uint32 word that tells attention's draws of one step apart."""
    seed = tl.load(state_ptr)
    step = tl.load(state_ptr + 1).to(tl.int32)
    _, _, word, _ = tl.philox(
        seed, step, layer.to(tl.int32), site.to(tl.int32), tl.full([], 0, tl.int32), ROUNDS
    )
    return word.to(tl.uint32)


@triton.jit
def token_words(state_ptr, sequence, position, head):
    """Each token's uint32 word as a query and as a key of attention, for all layers of a step."""
    seed = tl.load(state_ptr)
    step = tl.load(state_ptr + 1).to(tl.int32)
    zero = tl.full([], 0, tl.int32)
    first, second, _, _ = tl.philox(seed, step, zero, zero, zero + 1, ROUNDS)
    key = first.to(tl.uint64) | (second.to(tl.uint64) << 32)
    none = tl.zeros_like(position)
    as_query, as_key, _, _ = tl.philox(key, none + head, position, sequence, none, ROUNDS)
    return as_query.to(tl.uint32), as_key.to(tl.uint32)


@triton.jit
def keep_scores(row_words, column_words, THRESHOLD: tl.constexpr):
    """[rows, columns] bool: which scores dropout keeps; either side may be the queries."""
    word = row_words[:, None] ^ column_words[None, :]
    word = (word ^ (word >> 16)) * HASH_A
    word = (word ^ (word >> 15)) * HASH_B
    return word >= THRESHOLD


# one program makes one tile
@triton.jit(do_not_specialize=["rows", "layer", "site"])
def _dropout_kernel(
    x_ptr, y_ptr, state_ptr, sequence_ids_ptr, positions_ptr,
    x_row_stride,
    rows, layer, site,
    WIDTH: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(WIDTH, COLUMNS)
    row = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % column_tiles * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    row_mask = row < rows
    mask = row_mask[:, None] & (column < WIDTH)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    key = subkey(state_ptr, layer, site)
    sequence, position = row_coordinates(state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask)
    keep = keep_factors(key, sequence, position, first, COLUMNS, THRESHOLD, SCALE)
    x = tl.load(x_ptr + wide_row * x_row_stride + column[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + wide_row * WIDTH + column[None, :], x.to(tl.float32) * keep, mask=mask)


def dropout_rows(
    x: Tensor,
    state: Tensor,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    layer: int,
    site: int,
    dropout_p: float,
) -> Tensor:
    """[rows, columns] like x, each element zeroed or scaled."""
    rows, width = x.shape
    y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chosen = launch.configure("dropout", x, width)
    launch.run(
        _dropout_kernel,
        (triton.cdiv(rows, chosen.rows) * triton.cdiv(width, chosen.columns),),
        x, y, state, sequence_ids, positions,
        x.stride(0),
        rows, layer, site,
        launch=chosen, WIDTH=width,
        THRESHOLD=philox.keep_threshold(dropout_p), SCALE=philox.keep_scale(dropout_p),
        ROWS=chosen.rows, COLUMNS=chosen.columns,
    )  # fmt: skip
    return y
