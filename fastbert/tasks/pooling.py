"""One vector a sequence: the mean of its tokens' states, or its first token's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert.packing import PackedBatch
from fastbert.tasks.losses import widened

POOLING = ("mean", "cls")


def pool_tokens(hidden_states: Tensor, batch: PackedBatch, how: str) -> Tensor:
    """[tokens, hidden_size] -> [sequences, hidden_size], fp32 at least.

    Args:
        hidden_states: packed; tail rows are not looked at.
        batch: says which rows are of which sequence.
        how: "mean", or "cls" for the first token.
    """
    if how == "cls":
        return widened(hidden_states[batch.first_tokens])
    starts = batch.cu_seqlens.long()
    lengths = starts[1:] - starts[:-1]
    owner = torch.repeat_interleave(lengths, output_size=batch.num_tokens)
    states = widened(hidden_states[: batch.num_tokens])
    sums = states.new_zeros(len(lengths), states.shape[1]).index_add(0, owner, states)
    return sums / lengths.clamp(min=1)[:, None]
