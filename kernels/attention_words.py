"""Dropout's random words of each token and head, drawn once a step for the attention of all layers.

A score's draw mixes the word of its query, that of its key and one of the layer (philox.py). Drawn
inside attention, a thread would draw the words of many keys again and again: each sees them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels.dropout import row_coordinates, token_words


# one program draws for BLOCK_M tokens of one head
@triton.jit(do_not_specialize=["tokens"])
def _attention_words_kernel(
    words_ptr, state_ptr, sequence_ids_ptr, positions_ptr,
    tokens,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    row = tl.program_id(0) // HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < tokens
    sequence, position = row_coordinates(state_ptr, sequence_ids_ptr, positions_ptr, row, row_mask)
    as_query, as_key = token_words(state_ptr, sequence, position, head)
    place = words_ptr + head.to(tl.int64) * tokens + row
    tl.store(place, as_query.to(tl.int32, bitcast=True), mask=row_mask)
    behind = place + HEADS * tokens.to(tl.int64)
    tl.store(behind, as_key.to(tl.int32, bitcast=True), mask=row_mask)


def attention_words(
    state: Tensor, sequence_ids: Tensor | None, positions: Tensor | None, tokens: int, heads: int
) -> Tensor:
    """[2, heads, tokens] int32: each token's word as a query and as a key."""
    words = torch.empty((2, heads, tokens), dtype=torch.int32, device=state.device)
    if words.numel() == 0:
        return words
    chosen = launch.configure("attention_words", words, heads)
    launch.run(
        _attention_words_kernel,
        (triton.cdiv(tokens, chosen.rows) * heads,),
        words, state, sequence_ids, positions,
        tokens,
        launch=chosen, HEADS=heads, BLOCK_M=chosen.rows,
    )  # fmt: skip
    return words
