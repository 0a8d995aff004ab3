"""Fine-tuning batches: every example once an epoch, in an order drawn from (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.packing import Capacity, Examples, PackedBatch

# a stream's length comes in steps, because a matrix library prepares code for every new shape
TOKEN_STEP = 32
_ORDER = 3


class EpochStream:
    """Deals labelled examples into micro-batches of optimiser steps.

    An epoch's examples are dealt evenly: its steps differ by one example at most, so that none
    is a small and noisy rest.

    Args:
        examples: all of them.
        batch_size: sequences an optimiser step at most.
        accumulation: micro-batches an optimiser step.
        seed: of the order.

    Attributes:
        steps: optimiser steps an epoch.

    Raises:
        InputError: sizes out of range, or fewer examples than micro-batches.
    """

    def __init__(
        self, examples: Examples, batch_size: int, accumulation: int = 1, seed: int = 0
    ) -> None:
        self.examples = examples
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
        for number in range(position.batch, len(dealt)):
            chosen = dealt[number]
            batch = self.examples.batch(chosen, snug_capacity(self.examples.lengths[chosen]))
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


def snug_capacity(lengths: np.ndarray) -> Capacity:
    """The smallest capacity in steps that sequences of these lengths fit; no masked positions."""
    tokens = -(-int(lengths.sum()) // TOKEN_STEP) * TOKEN_STEP
    return Capacity(tokens, len(lengths), 0)
