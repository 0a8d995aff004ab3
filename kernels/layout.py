"""Where each sequence of a packed stream lies, worked out once a batch for all layers.

Kernels read row ranges and tile bounds, whose shapes follow from the capacity alone; the reference
path reads groups of sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.kernels.attention_blocks import Blocks, chunks
from fastbert.kernels.groups import Group, plan_groups
from fastbert.kernels.transfer import overwrite, sent

# a tile that owns its sequences whole has at most this many rows
OWNED_BLOCKS = (64, 128)


class Rows(NamedTuple):
    """Coordinates of each row of the stream, [capacity] int32; zeros in the tail.

    Attributes:
        starts, ends: the row's sequence is rows [start, end); empty in the tail.
        positions: the row's place in its sequence.
        sample_ids: global sample index of the row's sequence; None where the batch has none.
    """

    starts: Tensor
    ends: Tensor
    positions: Tensor
    sample_ids: Tensor | None = None


@dataclass
class Layout:
    """Row ranges of a packed stream of `capacity` tokens.

    Attributes:
        cu_seqlens: [sequences + 1] int32, first 0, last the number of real tokens; empty
            slots repeat the last value. Checked here where it lies on the host.
        capacity: tokens in the stream, tail included.
        max_seqlen: an upper bound of the sequence lengths.
        sample_ids: [sequences] integers, the global sample index of each, for dropout's masks.

    Raises:
        ValueError: cu_seqlens that do not ascend from 0 to the capacity at most, or a sequence
            longer than `max_seqlen`.
    """

    cu_seqlens: Tensor
    capacity: int
    max_seqlen: int
    sample_ids: Tensor | None = None
    _rows: Tensor | None = field(default=None, repr=False)
    _tiles: Tensor | None = field(default=None, repr=False)
    _groups: dict[bool, list[Group]] = field(default_factory=dict, repr=False)
    _chunks: dict[tuple[bool, int, int], list[Blocks]] = field(default_factory=dict, repr=False)
    _num_tokens: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check()

    def check(self) -> None:
        """Raise ValueError for wrong cu_seqlens; waits for the device where they lie on one."""
        bounds, sample_ids = self.cu_seqlens, self.sample_ids
        if bounds.dim() != 1 or not len(bounds) or bounds.is_floating_point():
            raise ValueError(
                "cu_seqlens: must be [sequences + 1] integers, got "
                f"{list(bounds.shape)} {bounds.dtype}"
            )
        if sample_ids is not None and sample_ids.shape != (len(bounds) - 1,):
            raise ValueError(
                f"sample_ids: must be [{len(bounds) - 1}], one a sequence, got "
                f"{list(sample_ids.shape)}"
            )
        values = bounds.tolist()
        lengths = [end - start for start, end in itertools.pairwise(values)]
        if values[0] != 0 or min(lengths, default=0) < 0 or values[-1] > self.capacity:
            raise ValueError(
                f"cu_seqlens: must ascend from 0 to at most {self.capacity} tokens, got {values}"
            )
        if max(lengths, default=0) > self.max_seqlen:
            raise ValueError(
                f"cu_seqlens: a sequence of {max(lengths)} tokens exceeds max_seqlen "
                f"{self.max_seqlen}"
            )

    def num_tokens(self) -> int:
        """Real tokens; reads cu_seqlens on the host."""
        if self._num_tokens is None:
            self._num_tokens = int(self.cu_seqlens[-1])
        return self._num_tokens

    def rows(self) -> Rows:
        """Coordinates of each row, made where cu_seqlens lies, without waiting for a device."""
        if self._rows is None:
            self._rows = _plan_rows(self.cu_seqlens, self.capacity, self.sample_ids)
        return Rows(*(column[: self.capacity] for column in self._rows.unbind(0)))

    @property
    def block(self) -> int | None:
        """Rows of the tiles that own their sequences; None where a sequence may be too long."""
        return next((size for size in OWNED_BLOCKS if self.max_seqlen <= size), None)

    def tiles(self) -> Tensor | None:
        """[tiles + 1] int32: tile i owns rows [i, i + 1), whole sequences or rows of the tail.

        At most `block` rows a tile and 2 * ceil(capacity / block) + 1 tiles, spare ones empty.
        None where a sequence may be too long for that.
        """
        if self.block is None:
            return None
        if self._tiles is None:
            self._tiles = _plan_tiles(self.cu_seqlens, self.capacity, self.block)
        return self._tiles

    def prepare(self) -> None:
        """Make rows and tiles now, on a thread that has the time."""
        self.rows()
        self.tiles()

    def groups(self, dtype: torch.dtype) -> list[Group]:
        """The plan of the reference path's attention in `dtype`; reads cu_seqlens on the host."""
        rounded = dtype.itemsize < 4
        if rounded not in self._groups:
            self._groups[rounded] = plan_groups(self.cu_seqlens, rounded=rounded)
        return self._groups[rounded]

    def chunks(self, dtype: torch.dtype, heads: int, head_dim: int) -> list[Blocks]:
        """How these groups' rows are moved, in tensors [capacity, heads, head_dim]."""
        key = (dtype.itemsize < 4, heads, head_dim * dtype.itemsize)
        if key not in self._chunks:
            rounded, _, row_bytes = key
            self._chunks[key] = chunks(
                self.groups(dtype), self.capacity, heads, row_bytes, in_place=not rounded
            )
        return self._chunks[key]

    def whole(self, dtype: torch.dtype, heads: int) -> Blocks:
        """All groups at once."""
        return Blocks(self.groups(dtype), self.capacity, heads, whole=True, in_place=False)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Layout:
        """The same layout on `device`, rows and tiles made before they travel."""
        self.prepare()
        tensors = (self.cu_seqlens, self.sample_ids, self._rows, self._tiles)
        cu_seqlens, sample_ids, rows, tiles = (
            None if t is None else sent(t, device, non_blocking=non_blocking) for t in tensors
        )
        assert cu_seqlens is not None
        return Layout(cu_seqlens, self.capacity, self.max_seqlen, sample_ids, rows, tiles)

    def copy_(self, other: Layout) -> None:
        """Write another batch's rows into this memory, which a captured CUDA graph reads.

        Raises:
            ValueError: the other layout has other shapes.
        """
        ours, theirs = self._shape(), other._shape()
        if ours != theirs:
            raise ValueError(
                "layout: a layout to copy must have the same capacity, max_seqlen, slots and "
                f"sample ids, {ours}, got {theirs}"
            )
        self.prepare()
        other.prepare()
        for target, source in (
            (self.cu_seqlens, other.cu_seqlens),
            (self.sample_ids, other.sample_ids),
            (self._rows, other._rows),
            (self._tiles, other._tiles),
        ):
            if target is not None and source is not None:
                overwrite(target, source)
        self._groups, self._chunks, self._num_tokens = {}, {}, None

    def _shape(self) -> tuple[int, int, int, bool]:
        slots = self.cu_seqlens.shape[0] - 1
        return self.capacity, self.max_seqlen, slots, self.sample_ids is not None


def _plan_rows(cu_seqlens: Tensor, capacity: int, sample_ids: Tensor | None) -> Tensor:
    bounds = cu_seqlens.to(torch.int32).contiguous()
    sequences = len(bounds) - 1
    # each column begins at a multiple of 16 bytes: kernels know one alignment, not two
    pitch = -(-capacity // 4) * 4
    row = torch.arange(pitch, dtype=torch.int32, device=bounds.device)
    owner = torch.searchsorted(bounds[1:], row, right=True)
    real = row < bounds[-1]
    starts = torch.where(real, bounds[owner], 0)
    ends = torch.where(real, bounds[(owner + 1).clamp(max=sequences)], 0)
    columns = [starts, ends, torch.where(real, row - starts, 0)]
    if sample_ids is not None:
        # a slot for the tail; of wide ids the low 32 bits count
        ids = torch.cat([sample_ids.to(torch.int32), bounds.new_zeros(1)])
        columns.append(torch.where(real, ids[owner], 0))
    return torch.stack(columns)


def _plan_tiles(cu_seqlens: Tensor, capacity: int, block: int) -> Tensor:
    """Next fit: two neighbouring tiles hold more than `block` rows, so there are few of them."""
    bounds = cu_seqlens.to(torch.int32).contiguous()
    device = bounds.device
    count = 2 * -(-capacity // block) + 1
    # where the tile ends that begins with this sequence, as an index of cu_seqlens
    following = torch.searchsorted(bounds, bounds + block, right=True) - 1
    # doubling: the first 1, 2, 4, ... tiles, each round as many again, so that no step waits for
    # another on a device
    first = torch.zeros(1, dtype=torch.int64, device=device)
    while len(first) <= count:
        first = torch.cat([first, following[first]])
        following = following[following]
    edges = bounds[first[: count + 1]]
    # behind the last sequence tiles take the tail's rows, so that these are zeroed too
    index = torch.arange(count + 1, dtype=torch.int32, device=device)
    used = (edges < bounds[-1]).sum(dtype=torch.int32)
    tail = bounds[-1] + (index - used) * block
    return torch.where(index <= used, edges, tail.clamp(max=capacity))
