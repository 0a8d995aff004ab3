"""One vector a sequence: the mean of its tokens' states, or its first token's."""

from __future__ import annotations

from torch import Tensor

from fastbert.model import mean_of_tokens
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
    return mean_of_tokens(hidden_states, batch)
