"""Planned batches to written ones, several at a time, here or in a worker process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastbert.data.batches import Vocabulary, write_samples
from fastbert.data.draws import Draws
from fastbert.data.plan import Planner
from fastbert.data.samples import Samples
from fastbert.data.stream import Position, StreamConfig
from fastbert.packing import Examples, PackedBatch

# what is written at once: numpy's calls cost as much for a few tokens as for some thousand
TOKENS_TOGETHER = 1 << 15


@dataclass(frozen=True)
class Planned:
    """Batches that are written together, not yet written.

    Attributes:
        samples: of all of them, one batch after another.
        edges: [batches + 1] int64, where each begins among the samples.
        draws: of their seed and epoch.
        mask_probability, max_seq_len: of their optimiser steps.
        after: the position once each one's group is done.
    """

    samples: Samples
    edges: np.ndarray
    draws: Draws
    mask_probability: float
    max_seq_len: int
    after: tuple[Position, ...]

    @classmethod
    def alone(
        cls,
        samples: Samples,
        draws: Draws,
        mask_probability: float,
        max_seq_len: int,
        after: Position,
    ) -> Planned:
        """One batch."""
        edges = np.array([0, len(samples)], dtype=np.int64)
        return cls(samples, edges, draws, mask_probability, max_seq_len, (after,))

    @classmethod
    def join(cls, several: Sequence[Planned]) -> Planned:
        """Batches of one epoch and masking rate, in that order."""
        if len(several) == 1:
            return several[0]
        sizes = np.concatenate([np.diff(one.edges) for one in several])
        return replace(
            several[0],
            samples=Samples.join([one.samples for one in several]),
            edges=np.concatenate([[0], np.cumsum(sizes)]),
            after=tuple(after for one in several for after in one.after),
        )

    def goes_with(self, other: Planned) -> bool:
        """Whether both are drawn alike."""
        return self._manner == other._manner

    @property
    def _manner(self) -> tuple[float, ...]:
        return self.draws.key, self.mask_probability, self.max_seq_len


def batches_together(config: StreamConfig) -> int:
    """How many batches are written at once."""
    return max(TOKENS_TOGETHER // config.token_budget, 1)


def together(planned: Iterator[Planned], count: int) -> Iterator[Planned]:
    """Join up to `count` neighbours, which changes nothing that is random in them."""
    several: list[Planned] = []
    for one in planned:
        if several and (len(several) == count or not one.goes_with(several[0])):
            yield Planned.join(several)
            several = []
        several.append(one)
    if several:
        yield Planned.join(several)


def lay_out(
    examples: Examples, planned: Planned, planner: Planner
) -> Iterator[tuple[PackedBatch, Position]]:
    """Each of the planned batches, in the planner's sizes, with the position after it."""
    assert examples.masked_positions is not None
    edges = planned.edges
    masked = np.diff(np.searchsorted(examples.masked_positions, examples.cu_seqlens[edges]))
    for number, after in enumerate(planned.after):
        chosen = np.arange(edges[number], edges[number + 1])
        batch = examples.batch(chosen, planner.capacity(len(chosen), int(masked[number])))
        if planner.config.objective.detection:
            # every token is judged
            batch.num_labelled = batch.num_tokens
        if planner.config.fixed_shapes:
            # a compiled step is built for one value of it
            batch.max_seqlen = planner.config.max_seq_len
            # of such batches kernels read rows and tiles
            batch.layout.prepare()
        yield batch, after


class Writer:
    """Planned batches to examples; sent to worker processes once.

    Args:
        ids: [tokens] of each part.
        vocabulary: of the text.
        config: how text becomes batches.
        most_masked: targets a batch has room for, by the length of its sequences; None for any
            number.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        vocabulary: Vocabulary,
        config: StreamConfig,
        most_masked: Mapping[int, int | None] | None = None,
    ) -> None:
        self.ids = [np.asarray(array) for array in ids]
        self.vocabulary, self.config, self.most_masked = vocabulary, config, dict(most_masked or {})
        self._sources = [_source(array) for array in ids]

    def __reduce__(self) -> Any:
        # what lies on disk is mapped again over there, not sent
        return _opened, (self._sources, self.vocabulary, self.config, self.most_masked)

    def __call__(self, planned: Planned) -> Examples:
        return write_samples(
            self.ids,
            planned.samples,
            self.vocabulary,
            self.config.masking,
            planned.mask_probability,
            planned.draws,
            self.most_masked.get(planned.max_seq_len),
            planned.edges,
        )


def _source(array: np.ndarray) -> Any:
    if isinstance(array, np.memmap):
        return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape)
    return np.asarray, (array,)


def _opened(
    sources: Sequence[Any],
    vocabulary: Vocabulary,
    config: StreamConfig,
    most_masked: Mapping[int, int | None],
) -> Writer:
    ids = [make(*arguments) for make, arguments in sources]
    return Writer(ids, vocabulary, config, most_masked)


_writer: Writer | None = None


def take_writer(writer: Writer) -> None:
    """Keep the writer of this worker process."""
    global _writer
    _writer = writer


def write(planned: Planned) -> Examples:
    """Write by this process's writer."""
    assert _writer is not None
    examples = _writer(planned)
    # half the bytes on the way back
    return replace(
        examples,
        input_ids=examples.input_ids.astype(np.int32),
        token_type_ids=examples.token_type_ids.astype(np.int8),
    )
