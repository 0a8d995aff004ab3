"""Dropout's random numbers as Triton device functions; philox.py is their exact twin."""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.kernels import philox

ROUNDS: tl.constexpr = tl.constexpr(philox.ROUNDS)
COLUMNS_PER_CALL: tl.constexpr = tl.constexpr(philox.COLUMNS_PER_CALL)


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
