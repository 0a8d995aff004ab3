"""Fine-tuning batches: every example once an epoch, in an order drawn from (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.packing import Capacity, PackedBatch

# a stream's length comes in steps, because a matrix library prepares code for every new shape
TOKEN_STEP = 32
_ORDER = 3


class Dealt(Protocol):
    """What can be dealt into batches: sequences, or units of several."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""

    def __len__(self) -> int: ...

    def batch(self, chosen: np.ndarray, capacity: Capacity | None = None) -> PackedBatch:
        """Pack the chosen ones, in that order."""


class EpochStream:
    """Deals labelled examples into micro-batches of optimiser steps.

    An epoch's examples are dealt evenly: its steps differ by one example at most, so that none
    is a small and noisy rest.

    Args:
        examples: all of them.
        batch_size: sequences an optimiser step at most.
        accumulation: micro-batches an optimiser step.
        seed: of the order.
        fixed_shapes: all micro-batches of an epoch have one shape, the tail filled up.

    Attributes:
        steps: optimiser steps an epoch.

    Raises:
        InputError: sizes out of range, or fewer examples than micro-batches.
    """

    def __init__(
        self,
        examples: Dealt,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        *,
        fixed_shapes: bool = False,
    ) -> None:
        self.examples = examples
        self.fixed_shapes = fixed_shapes
        self.seed = seed
        self.accumulation = accumulation
        self.steps = steps_an_epoch(len(examples), batch_size, accumulation)

    def deal(self, epoch: int) -> list[np.ndarray]:
        """Indices of the examples of each micro-batch of an epoch, `steps * accumulation` long."""
        order = np.random.default_rng([self.seed, epoch, _ORDER]).permutation(len(self.examples))
        return [
            micro_batch
            for step in np.array_split(order, self.steps)
            for micro_batch in np.array_split(step, self.accumulation)
        ]

    def epoch_batches(self, position: Position) -> Iterator[tuple[PackedBatch, Position]]:
        """What is left of an epoch, each micro-batch with the position after it.

        Args:
            position: epoch and micro-batch that come next; the window is not used.
        """
        dealt = self.deal(position.epoch)
        lengths = self.examples.lengths
        fixed = roomy_capacity([lengths[chosen] for chosen in dealt]) if self.fixed_shapes else None
        for number in range(position.batch, len(dealt)):
            chosen = dealt[number]
            batch = self.examples.batch(chosen, fixed or snug_capacity(lengths[chosen]))
            if self.fixed_shapes:
                batch.max_seqlen = int(lengths.max())
            yield batch, Position(position.epoch, 0, number + 1)


def steps_an_epoch(examples: int, batch_size: int, accumulation: int = 1) -> int:
    """Optimiser steps that so many examples are dealt into.

    Raises:
        InputError: as `EpochStream`.
    """
    for flag, value in (("--batch-size", batch_size), ("--accumulation", accumulation)):
        if value < 1:
            raise InputError(f"{flag} must be at least 1, got {value}")
    steps = -(-examples // batch_size)
    smallest = examples // max(steps, 1)
    if accumulation > smallest:
        raise InputError(
            f"--accumulation must be at most the {smallest} examples of a step, got {accumulation}"
        )
    return steps


def roomy_capacity(dealt: list[np.ndarray]) -> Capacity:
    """A capacity that all micro-batches of these lengths fit; most epochs of a run get the same."""
    tokens = max(int(lengths.sum()) for lengths in dealt)
    # an eighth of the next smaller power of two
    step = max(1 << max(tokens.bit_length() - 4, 0), TOKEN_STEP)
    return Capacity(-(-tokens // step) * step, max(map(len, dealt)), 0)


def snug_capacity(lengths: np.ndarray) -> Capacity:
    """The smallest capacity in steps that sequences of these lengths fit; no masked positions."""
    tokens = -(-int(lengths.sum()) // TOKEN_STEP) * TOKEN_STEP
    return Capacity(tokens, len(lengths), 0)
