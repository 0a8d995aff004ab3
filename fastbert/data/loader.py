"""Pre-training batches without end, from any place, for any number of ranks and workers.

1. Windows of batches are planned, the same on every rank.
2. Batches are dealt in groups, one an optimiser step; every rank takes its own.
3. A thread, or worker processes, write out and mask what was planned, ahead of the step.

All is a function of (seed, epoch, global sample index): a resume needs a position, not a history.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from fastbert.data.batches import Vocabulary
from fastbert.data.curriculum import Curriculum
from fastbert.data.plan import Planner
from fastbert.data.regions import Part
from fastbert.data.stream import Position, StreamConfig
from fastbert.data.workers import worker_pool
from fastbert.data.writer import (
    Planned,
    Writer,
    batches_together,
    lay_out,
    take_writer,
    together,
    write,
)
from fastbert.errors import InputError
from fastbert.packing import Examples, PackedBatch
from fastbert.tokenizer import Tokenizer

# batches, or tasks a worker, that are ready before they are asked for
DEPTH = 4


class Loader:
    """Batches of one rank, prepared ahead of the step; close it to end its thread and workers.

    Args:
        parts: the text.
        tokenizer: of it.
        config: how text becomes batches.
        position: where to begin.
        step: optimiser steps done before it.
        group: batches an optimiser step, over all ranks.
        rank, ranks: this process's share: batches `rank`, `rank + ranks`, ... of each group. A
            rank that is one short gets an empty one.
        workers: processes that write batches; 0 for a thread of this process.
        replay: older text, as for `Planner`.
        curriculum: how length and `group` change; None for the same throughout. The first step at
            full length begins the next epoch: at another length the text is cut elsewhere.

    Attributes:
        waited_s: seconds the caller has waited for batches.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: Tokenizer,
        config: StreamConfig,
        position: Position | None = None,
        *,
        step: int = 0,
        group: int = 1,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        replay: Sequence[Part] = (),
        curriculum: Curriculum | None = None,
    ) -> None:
        if workers < 0:
            raise InputError(f"--loader-workers must be at least 0, got {workers}")
        self.curriculum = curriculum or Curriculum(config.max_seq_len, group)
        self.config, self.rank, self.ranks = config, rank, ranks
        lengths = {self.curriculum.seq_len_at(step), config.max_seq_len}
        self._planners = {
            length: Planner(parts, tokenizer, replace(config, max_seq_len=length), replay)
            for length in lengths
        }
        self.waited_s = 0.0
        ids = [part.corpus.ids for part in (*parts, *replay)]
        most_masked = {length: planner.masked for length, planner in self._planners.items()}
        self._writer = Writer(ids, Vocabulary.of(tokenizer), config, most_masked)
        self._ready: queue.Queue[tuple[PackedBatch, Position] | BaseException] = queue.Queue(
            max(DEPTH, 2 * batches_together(config))
        )
        self._closed = threading.Event()
        self._pool = worker_pool(workers, take_writer, self._writer) if workers else None
        self._ahead = DEPTH * max(workers, 1)
        self._thread = threading.Thread(
            target=self._produce, args=(position or Position(), step), daemon=True, name="batches"
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[PackedBatch, Position]]:
        return self

    def __next__(self) -> tuple[PackedBatch, Position]:
        began = time.monotonic()
        item = self._ready.get()
        self.waited_s += time.monotonic() - began
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        return item

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and the workers."""
        self._closed.set()
        self._thread.join()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _produce(self, position: Position, step: int) -> None:
        try:
            for batch in self._batches(self._dealt(position, step)):
                self._put(batch)
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _batches(self, dealt: Iterator[Planned]) -> Iterator[tuple[PackedBatch, Position]]:
        planned = together(dealt, batches_together(self.config))
        if self._pool is None:
            for several in planned:
                yield from self._laid_out(self._writer(several), several)
            return
        waiting: deque[tuple[Future[Examples], Planned]] = deque()
        for several in planned:
            waiting.append((self._pool.submit(write, several), several))
            if len(waiting) >= self._ahead:
                written, first = waiting.popleft()
                yield from self._laid_out(written.result(), first)

    def _laid_out(
        self, examples: Examples, planned: Planned
    ) -> Iterator[tuple[PackedBatch, Position]]:
        return lay_out(examples, planned, self._planners[planned.max_seq_len])

    def _dealt(self, position: Position, step: int) -> Iterator[Planned]:
        """This rank's share of every group."""
        length, batches = 0, None
        for number in itertools.count(step):
            if self.curriculum.seq_len_at(number) != length:
                length = self.curriculum.seq_len_at(number)
                if number and number == self.curriculum.longer_at:
                    position = Position(position.epoch + 1)
                batches = self._planners[length].from_position(position)
            assert batches is not None
            probability = self.config.mask_probability_at(number)
            size = self.curriculum.accumulation_at(number)
            group = [next(batches) for _ in range(size)]
            position = group[-1][2]
            own = group[self.rank :: self.ranks]
            for samples, draws, _ in own:
                yield Planned.alone(samples, draws, probability, length, position)
            for _ in range(-(-size // self.ranks) - len(own)):
                samples, draws, _ = group[0]
                nothing = samples[np.zeros(0, dtype=np.int64)]
                yield Planned.alone(nothing, draws, probability, length, position)

    def _put(self, item: tuple[PackedBatch, Position] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def one_pass(
    parts: Sequence[Part], tokenizer: Tokenizer, config: StreamConfig
) -> list[PackedBatch]:
    """Every sequence of a text once, the same each time: what scores are taken on."""
    planner = Planner(parts, tokenizer, config)
    ids = [part.corpus.ids for part in parts]
    most_masked = {config.max_seq_len: planner.masked}
    writer = Writer(ids, Vocabulary.of(tokenizer), config, most_masked)
    dealt = (
        Planned.alone(samples, draws, config.mask_probability, config.max_seq_len, Position())
        for samples, draws in planner.epoch()
    )
    return [
        batch
        for several in together(dealt, batches_together(config))
        for batch, _ in lay_out(writer(several), several, planner)
    ]
