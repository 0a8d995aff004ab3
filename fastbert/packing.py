"""PackedBatch: sequences end to end in one stream, no batch dimension, no padding inside."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.kernels.ops import Layout, overwrite, sent
from fastbert.segments import owners

IGNORE_INDEX = -100


@dataclass
class PackedBatch:
    """What flows through the whole program.

    Rows past the last sequence (the tail) belong to no sequence: their hidden states mean nothing
    and they receive zero gradient. Where shapes are fixed, unused slots are harmless: `cu_seqlens`
    repeats its last value, labels are -100.

    Attributes:
        input_ids, position_ids, token_type_ids: [tokens] int64.
        cu_seqlens: [sequences + 1] int32, first 0, last the number of real tokens.
        max_seqlen: an upper bound of the sequence lengths.
        num_tokens: real tokens.
        num_sequences: real sequences.
        sample_ids: [sequences] int64, the global sample index of each: exact dropout masks follow
            the sample, however it is packed. Without them they follow the row of the micro-batch.
        masked_positions: [masked] int64, rows the masked-LM head looks at.
        labels: [masked] int64, their ids, -100 in unused slots.
        num_masked: targets of the masked-LM objective.
        sequence_labels: [sequences] int64, one class a sequence, -100 in unused slots; or floating,
            [sequences] or [sequences, numbers], NaN in unused slots.
        span_labels: [sequences, 2] int64, where an answer starts and ends (its last token), counted
            from the sequence's first token; -100 where there is none.
        num_labelled: targets among the sequences; of replaced-token detection, its real tokens.
        num_choices: neighbouring sequences that are one question's choices; the label, which of
            them is right, stands at the first.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_tokens: int
    num_sequences: int
    sample_ids: Tensor | None = None
    masked_positions: Tensor | None = None
    labels: Tensor | None = None
    num_masked: int = 0
    sequence_labels: Tensor | None = None
    num_labelled: int = 0
    span_labels: Tensor | None = None
    num_choices: int = 1

    @property
    def capacity(self) -> int:
        """Tokens in the stream, tail included."""
        return self.input_ids.shape[0]

    @cached_property
    def layout(self) -> Layout:
        """Row ranges for attention, shared by all layers."""
        return Layout(self.cu_seqlens, self.capacity, self.max_seqlen, self.sample_ids)

    @cached_property
    def first_tokens(self) -> Tensor:
        """[sequences] int64, the row of each sequence's first token."""
        return self.cu_seqlens[:-1].long().clamp(max=self.capacity - 1)

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """[tokens] int64, the sequence of each row; the number of slots in tail rows."""
        return owners(self.cu_seqlens, self.capacity)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`, the layout among them."""
        moved: dict[str, Any] = {
            f.name: sent(value, device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        batch = dataclasses.replace(self, **moved)
        if torch.device(device).type != "cpu":
            # worked out where the batch comes from, so that a step never asks the device
            batch.__dict__["layout"] = self.layout.to(device, non_blocking=non_blocking)
        return batch

    def shapes(self) -> tuple[Any, ...]:
        """Equal for batches that can take each other's place in a captured CUDA graph."""
        tensors = {
            f.name: tuple(value.shape)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return (self.max_seqlen, *tensors.items())

    def copy_(self, other: PackedBatch) -> None:
        """Write another batch of the same `shapes` into this memory, without waiting for it.

        Raises:
            ValueError: other shapes.
        """
        if self.shapes() != other.shapes():
            raise ValueError(f"batch: must have shapes {self.shapes()}, got {other.shapes()}")
        for f in dataclasses.fields(self):
            value = getattr(other, f.name)
            if isinstance(value, Tensor):
                overwrite(getattr(self, f.name), value)
            else:
                setattr(self, f.name, value)
        self.layout.copy_(other.layout)


@dataclass(frozen=True)
class Capacity:
    """Fixed sizes, so that every training step has the same shapes.

    Attributes:
        tokens: length of the stream.
        sequences: slots in `cu_seqlens`, less one.
        masked: slots in `masked_positions`.
    """

    tokens: int
    sequences: int
    masked: int


@dataclass
class Examples:
    """Sequences on the host, end to end, before they are dealt into batches.

    Attributes:
        input_ids, token_type_ids: [tokens] integers.
        cu_seqlens: [sequences + 1] int64.
        masked_positions: [masked] int64 into the stream, ascending; None without the objective.
        labels: [masked] int64.
        sequence_labels: [sequences] int64, or floating [sequences] or [sequences, numbers]; None
            without the objective.
        span_labels: [sequences, 2] int64; None without the objective.
        num_choices: sequences a question, when choices are to be told apart.
        sample_ids: [sequences] int64, the global sample index of each; None where nobody counts.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    cu_seqlens: np.ndarray
    masked_positions: np.ndarray | None = None
    labels: np.ndarray | None = None
    sequence_labels: np.ndarray | None = None
    span_labels: np.ndarray | None = None
    num_choices: int = 1
    sample_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64."""
        return np.diff(self.cu_seqlens)

    @property
    def num_masked(self) -> np.ndarray:
        """[sequences] int64, targets of the masked-LM objective in each."""
        assert self.masked_positions is not None
        return np.diff(np.searchsorted(self.masked_positions, self.cu_seqlens))

    @classmethod
    def from_lists(
        cls,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        sequence_labels: Sequence[int] | None = None,
    ) -> Examples:
        """Join one list of ids a sequence."""
        lengths = [len(ids) for ids in input_ids]
        types = [[0] * n for n in lengths] if token_type_ids is None else token_type_ids
        return cls(
            input_ids=_joined(input_ids),
            token_type_ids=_joined(types),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            sequence_labels=None if sequence_labels is None else _labels(sequence_labels),
        )

    def batch(
        self, chosen: Sequence[int] | np.ndarray, capacity: Capacity | None = None
    ) -> PackedBatch:
        """Pack the chosen sequences, in that order.

        Args:
            chosen: indices of sequences.
            capacity: fixed sizes, or None for exactly what is needed.

        Raises:
            ValueError: the chosen sequences exceed the capacity.
        """
        chosen = np.asarray(chosen, dtype=np.int64)
        lengths = self.lengths[chosen]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        tokens = int(cu_seqlens[-1])
        position_ids = np.arange(tokens) - np.repeat(cu_seqlens[:-1], lengths)
        rows = self._rows(chosen, position_ids, lengths)
        size = capacity or Capacity(tokens, len(chosen), 0)
        if tokens > size.tokens or len(chosen) > size.sequences:
            raise ValueError(
                f"batch: {tokens} tokens in {len(chosen)} sequences exceed the capacity "
                f"of {size.tokens} and {size.sequences}"
            )
        batch = PackedBatch(
            input_ids=_filled(self.input_ids[rows], size.tokens, 0),
            position_ids=_filled(position_ids, size.tokens, 0),
            token_type_ids=_filled(self.token_type_ids[rows], size.tokens, 0),
            cu_seqlens=_filled(cu_seqlens, size.sequences + 1, tokens).int(),
            max_seqlen=int(lengths.max(initial=0)),
            num_tokens=tokens,
            num_sequences=len(chosen),
        )
        if self.sample_ids is not None:
            batch.sample_ids = _filled(self.sample_ids[chosen], size.sequences, 0)
        if self.masked_positions is not None:
            self._add_masked(batch, chosen, cu_seqlens, capacity)
        if self.sequence_labels is not None:
            labels = self.sequence_labels[chosen]
            if np.issubdtype(labels.dtype, np.floating):
                batch.sequence_labels = _filled(labels, size.sequences, np.nan)
                absent = np.isnan(labels)
                present = ~(absent if absent.ndim == 1 else absent.all(axis=1))
            else:
                batch.sequence_labels = _filled(labels, size.sequences, IGNORE_INDEX)
                present = labels != IGNORE_INDEX
            batch.num_labelled = int(present.sum())
        if self.span_labels is not None:
            spans = self.span_labels[chosen]
            batch.span_labels = _filled(spans, size.sequences, IGNORE_INDEX)
            inside = (spans >= 0) & (spans < lengths[:, None])
            batch.num_labelled = int(inside.all(axis=1).sum())
        batch.num_choices = self.num_choices
        return batch

    def _rows(
        self, chosen: np.ndarray, position_ids: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray | slice:
        """Where the chosen sequences' tokens are; neighbours lie end to end already."""
        if len(chosen) and bool((np.diff(chosen) == 1).all()):
            return slice(self.cu_seqlens[chosen[0]], self.cu_seqlens[chosen[-1] + 1])
        return position_ids + np.repeat(self.cu_seqlens[:-1][chosen], lengths)

    def _add_masked(
        self,
        batch: PackedBatch,
        chosen: np.ndarray,
        cu_seqlens: np.ndarray,
        capacity: Capacity | None,
    ) -> None:
        assert self.masked_positions is not None and self.labels is not None
        bounds = np.searchsorted(self.masked_positions, self.cu_seqlens)
        counts = (bounds[1:] - bounds[:-1])[chosen]
        total = int(counts.sum())
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        picked = np.repeat(bounds[:-1][chosen], counts) + within
        shift = np.repeat(cu_seqlens[:-1] - self.cu_seqlens[:-1][chosen], counts)
        slots = capacity.masked if capacity else total
        if total > slots:
            raise ValueError(f"batch: {total} masked positions exceed the capacity of {slots}")
        batch.masked_positions = _filled(self.masked_positions[picked] + shift, slots, 0)
        batch.labels = _filled(self.labels[picked], slots, IGNORE_INDEX)
        batch.num_masked = total


def pack(
    input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None = None
) -> tuple[PackedBatch, Tensor]:
    """Drop the padding of a padded batch.

    Args:
        input_ids: [batch, length] integers.
        attention_mask: [batch, length], nonzero at real tokens; None where all are real. The mask
            may have holes: position ids are those of the padded layout, as in transformers.
        token_type_ids: [batch, length]; None for zeros.

    Returns:
        The packed batch (sequence i is row i, empty rows are empty sequences), and `rows`, int64
        [tokens], where each packed token stood in the flattened padded batch.

    Raises:
        ValueError: shapes that do not fit.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"pack: input_ids must be [batch, length], got {list(input_ids.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"pack: {name} must be {list(input_ids.shape)}, got {list(tensor.shape)}"
            )
    batch_size, length = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask != 0
    rows = real.flatten().nonzero().squeeze(1)
    lengths = real.sum(dim=1)
    cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=input_ids.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    batch = PackedBatch(
        input_ids=input_ids.flatten()[rows],
        position_ids=rows % length,
        token_type_ids=types.flatten()[rows],
        cu_seqlens=cu_seqlens,
        max_seqlen=length,
        num_tokens=rows.shape[0],
        num_sequences=batch_size,
    )
    return batch, rows


def unpack(
    hidden_states: Tensor, rows: Tensor, shape: tuple[int, int], at_padding: float = 0.0
) -> Tensor:
    """Put packed rows back where `pack` took them from.

    Args:
        hidden_states: [tokens, ...].
        rows: from `pack`.
        shape: (batch, length) of the padded batch.
        at_padding: what stands at padding.

    Returns:
        [batch, length, ...].
    """
    size = (shape[0] * shape[1], *hidden_states.shape[1:])
    padded = hidden_states.new_full(size, at_padding)
    return padded.index_copy(0, rows, hidden_states).unflatten(0, shape)


def best_fit(
    lengths: Sequence[int] | np.ndarray, budget: int, max_sequences: int | None = None
) -> list[list[int]]:
    """Best-fit decreasing (Johnson 1974): the longest first, each into the fullest batch it fits.

    Args:
        lengths: of the sequences, each at most `budget`.
        budget: tokens a batch.
        max_sequences: sequences a batch at most.

    Returns:
        Indices of the sequences of each batch, in the order in which batches were opened. Every
        index appears once.

    Raises:
        ValueError: a sequence longer than the budget.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[list[int]] = []
    # (free tokens, batch), ascending: the first that is large enough is the fullest
    free: list[tuple[int, int]] = []
    for index in order.tolist():
        length = int(lengths[index])
        if length > budget:
            raise ValueError(f"best_fit: a sequence of {length} tokens exceeds the budget {budget}")
        slot = bisect.bisect_left(free, (length, -1))
        if slot == len(free):
            batches.append([])
            left, chosen = budget, len(batches) - 1
        else:
            left, chosen = free.pop(slot)
        batches[chosen].append(index)
        if max_sequences is None or len(batches[chosen]) < max_sequences:
            bisect.insort(free, (left - length, chosen))
    return batches


def _labels(values: Sequence[Any]) -> np.ndarray:
    # an empty list says nothing of its kind, and numpy takes it for floating
    return np.asarray(values) if len(values) else np.zeros(0, dtype=np.int64)


def _joined(parts: Sequence[Sequence[int]]) -> np.ndarray:
    if not len(parts):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _filled(values: np.ndarray, size: int, fill: float) -> Tensor:
    dtype = np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64
    out = np.empty((size, *values.shape[1:]), dtype=dtype)
    out[: len(values)] = values
    out[len(values) :] = fill
    return torch.from_numpy(out)
