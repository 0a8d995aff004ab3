"""Units: what a task deals into batches, one sequence or several that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.packing import IGNORE_INDEX, Capacity, Examples, PackedBatch


@dataclass
class TaskBatch(PackedBatch):
    """A packed batch with a task's targets; a unit is one sequence, or neighbouring ones.

    Attributes:
        cu_units: [units + 1] int64, the first sequence of each unit.
        unit_labels: [units] int64, a class a unit, -100 for none.
        values: [units, numbers] float32, numbers to be met.
        token_labels: [tokens] int64, a class a token, -100 for none.
        places: [sequences, places] int64, rows of the stream, -100 for none.
    """

    cu_units: Tensor | None = None
    unit_labels: Tensor | None = None
    values: Tensor | None = None
    token_labels: Tensor | None = None
    places: Tensor | None = None


@dataclass
class Units:
    """All units of a file, on the host.

    Attributes:
        input_ids, token_type_ids: one array a sequence.
        cu_units: [units + 1] int64; None where every sequence is a unit.
        rows: [sequences] int64, which row of the file each is of; None where each is its own.
        unit_labels, values, places: as in TaskBatch; places counted from the sequence's start.
        token_labels: one array a sequence.
        notes: what reading answers off a sequence needs, one a sequence.
    """

    input_ids: Sequence[np.ndarray]
    token_type_ids: Sequence[np.ndarray]
    cu_units: np.ndarray | None = None
    rows: np.ndarray | None = None
    unit_labels: np.ndarray | None = None
    values: np.ndarray | None = None
    token_labels: Sequence[np.ndarray] | None = None
    places: np.ndarray | None = None
    notes: Sequence[Any] = ()
    examples: Examples = field(init=False)
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        nothing = np.zeros(0, dtype=np.int64)
        starts = np.cumsum([0, *map(len, self.input_ids)], dtype=np.int64)
        self.examples = Examples(
            input_ids=np.concatenate([nothing, *self.input_ids]),
            token_type_ids=np.concatenate([nothing, *self.token_type_ids]),
            cu_seqlens=starts,
        )
        if self.cu_units is None:
            self.cu_units = np.arange(len(self.input_ids) + 1)
        if self.rows is None:
            self.rows = np.repeat(np.arange(len(self)), np.diff(self.cu_units))
        # tokens a unit
        self.lengths = np.diff(starts[self.cu_units])

    def __len__(self) -> int:
        assert self.cu_units is not None
        return len(self.cu_units) - 1

    def sequences_of(self, chosen: np.ndarray) -> np.ndarray:
        """Indices of the sequences of these units, in their order."""
        assert self.cu_units is not None
        counts = np.diff(self.cu_units)[chosen]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(self.cu_units[:-1][chosen], counts) + within

    def batch(
        self, chosen: Sequence[int] | np.ndarray, capacity: Capacity | None = None
    ) -> TaskBatch:
        """Pack the chosen units, in that order; only the capacity's tokens are looked at."""
        chosen = np.asarray(chosen, dtype=np.int64)
        assert self.cu_units is not None
        sequences = self.sequences_of(chosen)
        size = capacity and Capacity(capacity.tokens, len(sequences), 0)
        packed = self.examples.batch(sequences, size)
        batch = TaskBatch(**{name: getattr(packed, name) for name in packed.__dataclass_fields__})
        counts = np.diff(self.cu_units)[chosen]
        batch.cu_units = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        batch.num_labelled = len(chosen)
        if self.unit_labels is not None:
            labels = self.unit_labels[chosen]
            batch.unit_labels = torch.from_numpy(labels)
            batch.num_labelled = int((labels != IGNORE_INDEX).sum())
        if self.values is not None:
            batch.values = torch.from_numpy(self.values[chosen].astype(np.float32))
        if self.token_labels is not None:
            labels = np.full(batch.capacity, IGNORE_INDEX, dtype=np.int64)
            own = [self.token_labels[number] for number in sequences]
            labels[: batch.num_tokens] = np.concatenate([labels[:0], *own])
            batch.token_labels = torch.from_numpy(labels)
            batch.num_masked = int((labels != IGNORE_INDEX).sum())
        if self.places is not None:
            starts = batch.cu_seqlens[:-1].long()[:, None]
            places = torch.from_numpy(self.places[sequences])
            batch.places = torch.where(places < 0, IGNORE_INDEX, places + starts)
        return batch
