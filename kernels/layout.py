"""Where each sequence of a packed stream lies, worked out once a batch for all layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# sequences share a padded group while the shortest is at least this share of the longest
GROUP_FILL = 0.75
# below this length the matrix products are too small for the fill to matter; block lengths are
# multiples of it, because a matrix library prepares code anew for every new shape
GROUP_STEP = 16


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


@dataclass
class Layout:
    """Row ranges of a packed stream of `capacity` tokens.

    Attributes:
        cu_seqlens: [sequences + 1] int32, first 0, last the number of real tokens; empty
            slots repeat the last value.
        capacity: tokens in the stream, tail included.
        max_seqlen: an upper bound of the sequence lengths.
    """

    cu_seqlens: Tensor
    capacity: int
    max_seqlen: int
    _groups: list[Group] | None = field(default=None, repr=False)
    _num_tokens: int | None = field(default=None, repr=False)

    def num_tokens(self) -> int:
        """Real tokens; reads cu_seqlens on the host."""
        if self._num_tokens is None:
            self._num_tokens = int(self.cu_seqlens[-1])
        return self._num_tokens

    def groups(self) -> list[Group]:
        """The plan of the reference path's attention; reads cu_seqlens on the host."""
        if self._groups is None:
            self._groups = _plan_groups(self.cu_seqlens)
        return self._groups


def _plan_groups(cu_seqlens: Tensor) -> list[Group]:
    bounds = cu_seqlens.to("cpu", torch.int64)
    starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
    real = lengths > 0
    starts, lengths = starts[real], lengths[real]
    if not len(lengths):
        return []
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    groups, first = [], 0
    sizes = lengths.tolist()
    for last in range(1, len(sizes) + 1):
        longest = sizes[first]
        if last < len(sizes) and sizes[last] >= min(longest * GROUP_FILL, longest - GROUP_STEP):
            continue
        groups.append(_group(starts[first:last], lengths[first:last], cu_seqlens.device))
        first = last
    return groups


def _group(starts: Tensor, lengths: Tensor, device: torch.device) -> Group:
    length = -(-int(lengths[0]) // GROUP_STEP) * GROUP_STEP
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
