"""Packed rows as the blocks that the reference path's attention computes, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastbert.kernels.groups import Group

# bytes of one tensor's rows that are moved at once: few calls for short sequences, and memory that
# is still in a processor's cache when it is read
CHUNK_BYTES = 1 << 20


@dataclass
class Blocks:
    """Moves the rows of some groups to blocks and back.

    A row here is one head of one token. Blocks lie one behind the other as [sequences, heads,
    length, head_dim], as matrix products read them. A group without padding that is one run of rows
    needs no list of them.

    Attributes:
        groups: whose blocks these are.
        tokens: of the stream, tail included.
        heads: of the tensors.
        whole: whether these are all groups of the stream.
        in_place: whether the block of such a run may be a view.
        slots: rows of all blocks.
    """

    groups: list[Group]
    tokens: int
    heads: int
    whole: bool
    in_place: bool
    slots: int = field(init=False)
    _sizes: list[int] = field(init=False, repr=False)
    _taken: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _given: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._sizes = [len(group.index) * self.heads for group in self.groups]
        self.slots = sum(self._sizes)
        self._is_run = len(self.groups) == 1 and self.groups[0].start is not None

    def take(self, tensor: Tensor) -> list[Tensor]:
        """[tokens, heads, head_dim] -> a block a group.

        A tensor that is part of a wider one is read where it lies.
        """
        if tensor.stride(2) != 1:
            # torch's fused attention would not look at it
            tensor = tensor.contiguous()
        if self._is_run:
            rows = _view(tensor, self.groups[0])
            return [rows if self.in_place else rows.contiguous()]
        width = tensor.shape[-1]
        if tensor.stride(1) != width or tensor.stride(0) % width:
            tensor = tensor.contiguous()
        pitch = tensor.stride(0) // width
        rows = tensor.as_strided(((self.tokens - 1) * pitch + self.heads, width), (width, 1))
        if pitch not in self._taken:
            self._taken[pitch] = self._slots(pitch)
        return self._split(rows.index_select(0, self._taken[pitch]))

    def room(self, like: Tensor, parts: int) -> tuple[Tensor, list[list[Tensor]]]:
        """Memory for the blocks of some tensors.

        Args:
            like: has their dtype, device and head_dim.
            parts: how many tensors.

        Returns:
            All rows and one more, for `give`; and the blocks to write, a list of groups a tensor.
        """
        flat = like.new_empty(parts * self.slots + 1, like.shape[-1])
        return flat, [self._split(part) for part in flat[:-1].split(self.slots)]

    def give(
        self,
        target: Tensor,
        blocks: list[list[Tensor]],
        flat: Tensor | None = None,
        fill: float = 0.0,
    ) -> None:
        """Write blocks to the rows they come from.

        Args:
            target: [tokens, parts, heads, head_dim]; rows of other groups are left alone.
            blocks: a list of groups for each of the parts.
            flat: where `room` has made them.
            fill: of rows that are of no sequence, where these are all groups.
        """
        if self._is_run:
            for part, (block,) in zip(target.unbind(1), blocks, strict=True):
                _view(part, self.groups[0]).copy_(block)
            return
        if flat is None:
            flat = _concatenated(blocks)
        places = self._places(len(blocks))
        if self.whole:
            flat[-1].fill_(fill)
            torch.index_select(flat, 0, places, out=target.view(-1, flat.shape[1]))
            return
        rows = flat.index_select(0, places).view(-1, *target.shape[1:])
        target.index_copy_(0, self._rows(), rows)

    def joined(self, blocks: list[list[Tensor]]) -> Tensor:
        """`give`, differentiable, for all groups of a stream."""
        flat = _concatenated(blocks)
        rows = flat.index_select(0, self._places(len(blocks)))
        return rows.view(self.tokens, len(blocks), self.heads, flat.shape[1])

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [
            part.view(group.sequences, self.heads, group.length, flat.shape[1])
            for part, group in zip(flat.split(self._sizes), self.groups, strict=True)
        ]

    def _slots(self, pitch: int) -> Tensor:
        """The row of every slot."""
        parts = []
        head = torch.arange(self.heads, device=self.groups[0].index.device)[:, None]
        for group in self.groups:
            tokens = group.index.view(group.sequences, 1, group.length)
            parts.append((tokens * pitch + head).flatten())
        return torch.cat(parts)

    def _rows(self) -> Tensor:
        """[real tokens of these groups], token rows."""
        return torch.cat([group.rows for group in self.groups])

    def _places(self, parts: int) -> Tensor:
        """The slot of every row: of all tokens where the groups are all, or else of `_rows`."""
        if parts in self._given:
            return self._given[parts]
        device = self.groups[0].index.device
        head = torch.arange(self.heads, device=device)
        places = []
        before = 0
        for group, size in zip(self.groups, self._sizes, strict=True):
            sequence = group.slots // group.length
            base = before + sequence * (self.heads * group.length) + group.slots % group.length
            places.append(base[:, None] + head * group.length)
            before += size
        part = torch.arange(parts, device=device)[:, None] * self.slots
        spread = torch.cat(places)[:, None] + part
        if self.whole:
            everywhere = spread.new_full((self.tokens, parts, self.heads), parts * self.slots)
            spread = everywhere.index_copy_(0, self._rows(), spread)
        self._given[parts] = spread.flatten()
        return self._given[parts]


def chunks(
    groups: list[Group], tokens: int, heads: int, row_bytes: int, *, in_place: bool
) -> list[Blocks]:
    """Groups in their order: a run of rows alone, others as many at once as CHUNK_BYTES hold."""
    found: list[list[Group]] = []
    held = 0
    for group in groups:
        size = len(group.index) * heads * row_bytes
        alone = group.start is not None
        if alone or not found or held + size > CHUNK_BYTES:
            found.append([])
            held = 0
        found[-1].append(group)
        held = CHUNK_BYTES if alone else held + size
    return [Blocks(each, tokens, heads, len(found) == 1, in_place) for each in found]


def _concatenated(blocks: list[list[Tensor]]) -> Tensor:
    """Rows of all blocks, and one of zeros."""
    width = blocks[0][0].shape[-1]
    flat = [block.reshape(-1, width) for of_part in blocks for block in of_part]
    return torch.cat([*flat, flat[0].new_zeros(1, width)])


def _view(tensor: Tensor, group: Group) -> Tensor:
    """The rows of a contiguous group where they lie, [sequences, heads, length, head_dim]."""
    assert group.start is not None
    rows = tensor.narrow(0, group.start, group.sequences * group.length)
    if group.sequences == 1:
        # most groups are of one sequence, and every call counts
        return rows.transpose(0, 1).unsqueeze(0)
    return rows.view(group.sequences, group.length, *rows.shape[1:]).transpose(1, 2)
