"""Sums over neighbouring rows of a stream, in an order that never changes."""

from __future__ import annotations

import torch
from torch import Tensor


def owners(bounds: Tensor, rows: int) -> Tensor:
    """[rows] int64, the segment of each; the number of segments for rows past the last one.

    Args:
        bounds: [segments + 1] integers, ascending from 0.
        rows: how many there are.
    """
    numbers = torch.arange(rows, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), numbers, right=True)


def segment_sum(values: Tensor, bounds: Tensor, owner: Tensor) -> Tensor:
    """[rows, ...] -> [segments, ...]: sums of rows [bounds[i], bounds[i + 1]).

    Args:
        values: fp32 or wider; rows past the last bound may hold anything, and get no gradient.
        bounds: [segments + 1] integers, ascending from 0.
        owner: of `owners`.
    """
    if values.is_cuda:
        # adding by index is atomic there: its last bits differ from run to run
        return torch.segment_reduce(values, "sum", offsets=bounds, axis=0)
    # four times as fast on a CPU, in the same order; one slot more for what is past the end
    sums = values.new_zeros((len(bounds), *values.shape[1:]))
    return sums.index_add(0, owner, values)[:-1]
