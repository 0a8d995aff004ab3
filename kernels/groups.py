"""Which sequences the reference path's attention computes as one block.

One block a sequence spends its time on calls where sequences are short; one block of them all
spends it on padding and on memory, since scores leave the processor's cache between two passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# block lengths are multiples of it, because a matrix library prepares code anew for every new shape
# in 16 bits
GROUP_STEP = 16
# scores of one head that may be computed for nothing to save a block's calls
MERGED_SCORES = 2048
# scores of one head in a block: with a dozen heads they stay in a core's cache
BLOCK_SCORES = 1 << 14
# where lengths need not be rounded, longer sequences are blocks of their own, and nothing is copied
# on the way in; shorter ones share a block with those of their length
SHARED_LENGTH = 32


@dataclass
class Group:
    """Sequences of similar length, addressed as one padded block.

    Attributes:
        sequences, length: the block's shape.
        index: [sequences * length] int64, the token row of each slot; padding slots repeat the
            sequence's own first row, so that a neighbour's values never enter.
        padding: [sequences, length] bool, or None where no slot is padding.
        slots, rows: [real tokens] int64, the slots that are not padding, and their token rows.
        start: first row where the group is one contiguous run without padding, else None.
    """

    sequences: int
    length: int
    index: Tensor
    padding: Tensor | None
    slots: Tensor
    rows: Tensor
    start: int | None
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)
    _real: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores: minus infinity at padding keys, [sequences, 1, 1, length].

        Made once for all layers; None where no slot is padding.
        """
        if self.padding is None:
            return None
        if dtype not in self._bias:
            zeros = torch.zeros(self.padding.shape, dtype=dtype, device=self.padding.device)
            self._bias[dtype] = zeros.masked_fill_(self.padding, -math.inf)[:, None, None, :]
        return self._bias[dtype]

    def real(self, dtype: torch.dtype) -> Tensor | None:
        """What gradients of queries are multiplied by: 0 for padding, else 1.

        [sequences, 1, length, 1], made once for all layers; None where no slot is padding.
        """
        if self.padding is None:
            return None
        if dtype not in self._real:
            self._real[dtype] = (~self.padding).to(dtype)[:, None, :, None]
        return self._real[dtype]


def plan_groups(cu_seqlens: Tensor, *, rounded: bool) -> list[Group]:
    """Every sequence in one group, the longest first; empty ones in none.

    Args:
        cu_seqlens: [sequences + 1] integers; read on the host.
        rounded: whether all block lengths are multiples of GROUP_STEP; else no slot is padding.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    sizes, firsts = lengths[lengths > 0].tolist(), starts.tolist()
    device = cu_seqlens.device
    every = torch.arange(int(bounds[-1]), device=device)
    # how long a block of its own would be
    widths = [-(-size // GROUP_STEP) * GROUP_STEP for size in sizes] if rounded else sizes
    groups, first = [], 0
    while first < len(sizes):
        longest = sizes[first]
        if not rounded and longest > SHARED_LENGTH:
            groups.append(_alone(firsts[first], longest, every))
            first += 1
            continue
        length, last = widths[first], _end(widths, first, MERGED_SCORES if rounded else 0)
        groups.append(_group(starts[first:last], lengths[first:last], length, device))
        first = last
    return groups


def _end(widths: list[int], first: int, budget: int) -> int:
    """One past the last sequence of the block that begins with the first.

    Shorter sequences join with all others of their width, or not at all.
    """
    width = widths[first]
    stop = min(len(widths), first + max(1, BLOCK_SCORES // width**2))
    last = first + 1
    while last < stop:
        same = last + 1
        # of its own width, more than a block holds need not be counted
        end = stop if widths[last] == width else len(widths)
        while same < end and widths[same] == widths[last]:
            same += 1
        budget -= (same - last) * (width**2 - widths[last] ** 2)
        if budget < 0:
            break
        last = min(same, stop)
    return last


def _alone(start: int, length: int, every: Tensor) -> Group:
    rows = every.narrow(0, start, length)
    return Group(1, length, rows, None, every.narrow(0, 0, length), rows, start)


def _group(starts: Tensor, lengths: Tensor, length: int, device: torch.device) -> Group:
    places = torch.arange(length)
    valid = places < lengths[:, None]
    index = (starts[:, None] + torch.where(valid, places, 0)).flatten()
    slots = valid.flatten().nonzero().squeeze(1)
    whole = len(slots) == len(index)
    contiguous = whole and bool((index == index[0] + torch.arange(len(index))).all())
    return Group(
        sequences=len(starts),
        length=length,
        index=index.to(device),
        padding=None if whole else ~valid.to(device),
        slots=slots.to(device),
        rows=index[slots].to(device),
        start=int(index[0]) if contiguous else None,
    )
