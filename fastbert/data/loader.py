"""Pre-training batches without end, from any place, for any number of ranks and workers.

1. An epoch shuffles the text's regions; a window takes the next few hundred.
2. Its regions are cut into samples, these shuffled and packed by best fit: the plan of some
   hundred batches, made without looking at a token but for words that a cut would split.
3. Batches are dealt in groups, one an optimiser step; every rank plans alike and takes its own.
4. A thread, or worker processes, write out and mask what was planned, ahead of the step.

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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastbert.data.batches import Vocabulary, write_samples
from fastbert.data.draws import Draws
from fastbert.data.regions import Part, Regions
from fastbert.data.samples import Samples, plan_samples
from fastbert.data.stream import MASKED_STEP, SEQUENCE_STEP, Position, StreamConfig
from fastbert.data.workers import worker_pool
from fastbert.errors import InputError
from fastbert.packing import Capacity, Examples, PackedBatch, best_fit
from fastbert.tokenizer import Tokenizer

# batches a window holds; its last one may be part empty, so many make that small
WINDOW_BATCHES = 256
DEPTH = 4
_REGIONS, _SAMPLES, _BATCHES, _REPLAY = range(200, 204)


@dataclass
class Window:
    """A plan: samples, and which of them each batch holds."""

    samples: Samples
    batches: list[np.ndarray]
    draws: Draws


@dataclass(frozen=True)
class Planned:
    """One batch, not yet written out.

    Attributes:
        samples, draws: what `Writer` needs.
        mask_probability: of its optimiser step.
        after: the position once its group is done.
    """

    samples: Samples
    draws: Draws
    mask_probability: float
    after: Position


class Planner:
    """Plans windows.

    Args:
        parts: the text.
        tokenizer: of it.
        config: how text becomes batches.
        replay: older text, of which every window has `config.replay_share`. Its own epochs go on
            as it is used up, however often the text comes round.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer: Tokenizer,
        config: StreamConfig,
        replay: Sequence[Part] = (),
    ) -> None:
        self.config = config
        room = config.max_seq_len - config.objective.added_tokens
        self.regions = Regions([*parts, *replay], room, tokenizer.is_subword)
        self.own = int(self.regions.first[len(parts)])
        share = config.replay_share if replay else 0.0
        # regions of replay for one of the text
        self.replay_rate = share / (1.0 - share)
        wanted = WINDOW_BATCHES * config.token_budget / self.regions.size
        self.windows = max(round(self.own * (1.0 + self.replay_rate) / max(wanted, 1.0)), 1)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def window(self, epoch: int, number: int) -> Window:
        """Plan one of an epoch's `windows`."""
        draws = Draws(self.config.seed, epoch)
        edges = np.linspace(0, self.own, self.windows + 1).astype(np.int64)
        first, last = int(edges[number]), int(edges[number + 1])
        chosen = self._order(_REGIONS, epoch)[first:last]
        if self.replay_rate:
            replayed = self._replayed(epoch * self.own + first, epoch * self.own + last)
            chosen = np.concatenate([chosen, replayed])
        samples = plan_samples(self.regions, chosen, self.config.objective, draws)
        samples = samples[np.argsort(draws.of(_SAMPLES).words(samples.index), kind="stable")]
        batches = [np.sort(rows) for rows in self._packed(samples.lengths)]
        order = draws.of(_BATCHES).of(number).permutation(len(batches))
        return Window(samples, [batches[place] for place in order.tolist()], draws)

    def _order(self, purpose: int, epoch: int) -> np.ndarray:
        """An epoch's regions of the text, or of replay; the last few are kept."""
        if (purpose, epoch) not in self._orders:
            while len(self._orders) > 2:
                self._orders.pop(next(iter(self._orders)))
            count = self.own if purpose == _REGIONS else self.regions.count - self.own
            draws = Draws(self.config.seed, epoch).of(purpose)
            self._orders[purpose, epoch] = draws.permutation(count)
        return self._orders[purpose, epoch]

    def _replayed(self, first: int, last: int) -> np.ndarray:
        """Regions of replay that go with so many of the text's, counted over all epochs."""
        count = self.regions.count - self.own
        turns = np.arange(int(first * self.replay_rate), int(last * self.replay_rate))
        found = [
            self._order(_REPLAY, epoch)[turns[turns // count == epoch] % count]
            for epoch in np.unique(turns // count).tolist()
        ]
        return self.own + np.concatenate([np.zeros(0, dtype=np.int64), *found])

    def from_position(self, position: Position) -> Iterator[tuple[Samples, Draws, Position]]:
        """Every batch from a position on, without end, each with the position after it."""
        epoch, number, batch = position.epoch, position.window, position.batch
        while True:
            window = self.window(epoch, number)
            for place in range(batch, len(window.batches)):
                after = Position(epoch, number, place + 1)
                yield window.samples[window.batches[place]], window.draws, after
            batch, number = 0, number + 1
            if number == self.windows:
                epoch, number = epoch + 1, 0

    def epoch(self) -> Iterator[tuple[Samples, Draws]]:
        """Every batch of the first epoch."""
        for number in range(self.windows):
            window = self.window(0, number)
            for rows in window.batches:
                yield window.samples[rows], window.draws

    def capacity(self, sequences: int, masked: int) -> Capacity:
        """The stream is always as long as the budget; the rest is fixed, or a step of its size."""
        budget = self.config.token_budget
        if self.config.fixed_shapes:
            return Capacity(budget, _most_sequences(self.config), most_masked(self.config))
        return Capacity(
            tokens=budget,
            sequences=_rounded_up(sequences, SEQUENCE_STEP),
            masked=_rounded_up(masked, MASKED_STEP),
        )

    def _packed(self, lengths: np.ndarray) -> list[list[int]]:
        slots = _most_sequences(self.config) if self.config.fixed_shapes else None
        batches = best_fit(lengths, self.config.token_budget, slots)
        _fill_last(batches, lengths, self.config.token_budget, slots or len(lengths))
        return batches


def _fill_last(batches: list[list[int]], lengths: np.ndarray, budget: int, slots: int) -> None:
    """Bring the emptiest batch to three quarters, in place, by a sequence of each of the others.

    An optimiser that scales its steps would turn a rest of a handful of tokens into a full step.
    """
    tokens = [int(lengths[batch].sum()) for batch in batches]
    last = min(range(len(batches)), key=tokens.__getitem__)
    for donor in range(len(batches)):
        if tokens[last] >= 0.75 * budget or len(batches[last]) == slots:
            return
        # packed longest first: the first moves most
        longest = int(lengths[batches[donor][0]])
        if donor != last and len(batches[donor]) > 1 and tokens[last] + longest <= budget:
            batches[last].append(batches[donor].pop(0))
            tokens[last] += longest


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
    ) -> None:
        if workers < 0:
            raise InputError(f"--loader-workers must be at least 0, got {workers}")
        self.planner = Planner(parts, tokenizer, config, replay)
        self.group, self.rank, self.ranks = group, rank, ranks
        self.waited_s = 0.0
        ids = [part.corpus.ids for part in (*parts, *replay)]
        self._writer = _Writer(ids, Vocabulary.of(tokenizer), config)
        self._ready: queue.Queue[tuple[PackedBatch, Position] | BaseException] = queue.Queue(DEPTH)
        self._closed = threading.Event()
        self._pool = worker_pool(workers, _take, self._writer) if workers else None
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

    def _batches(self, planned: Iterator[Planned]) -> Iterator[tuple[PackedBatch, Position]]:
        if self._pool is None:
            for one in planned:
                yield lay_out(self._writer(one), self.planner), one.after
            return
        waiting: deque[tuple[Future[Examples], Position]] = deque()
        for one in planned:
            waiting.append((self._pool.submit(_write, one), one.after))
            if len(waiting) >= self._ahead:
                future, after = waiting.popleft()
                yield lay_out(future.result(), self.planner), after

    def _dealt(self, position: Position, step: int) -> Iterator[Planned]:
        """This rank's share of every group."""
        config = self.planner.config
        batches = self.planner.from_position(position)
        share = -(-self.group // self.ranks)
        for number in itertools.count(step):
            probability = config.mask_probability_at(number)
            group = [next(batches) for _ in range(self.group)]
            after = group[-1][2]
            own = group[self.rank :: self.ranks]
            for samples, draws, _ in own:
                yield Planned(samples, draws, probability, after)
            for _ in range(share - len(own)):
                samples, draws, _ = group[0]
                nothing = samples[np.zeros(0, dtype=np.int64)]
                yield Planned(nothing, draws, probability, after)

    def _put(self, item: tuple[PackedBatch, Position] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def most_masked(config: StreamConfig) -> int:
    """Slots for targets where shapes are fixed: a sequence masks at most one over its share; of
    words and spans it may be more, but hardly all sequences of a batch."""
    return int(config.token_budget * config.most_masked) + _most_sequences(config)


def _most_sequences(config: StreamConfig) -> int:
    return max(config.token_budget // 16, 1)


def lay_out(examples: Examples, planner: Planner) -> PackedBatch:
    """All sequences as one batch of the planner's sizes."""
    everything = np.arange(len(examples))
    capacity = planner.capacity(len(examples), int(examples.num_masked.sum()))
    batch = examples.batch(everything, capacity)
    if planner.config.fixed_shapes:
        # a compiled step is built for one value of it
        batch.max_seqlen = planner.config.max_seq_len
    return batch


def one_pass(
    parts: Sequence[Part], tokenizer: Tokenizer, config: StreamConfig
) -> list[PackedBatch]:
    """Every sequence of a text once, the same each time: what scores are taken on."""
    planner = Planner(parts, tokenizer, config)
    write = _Writer([part.corpus.ids for part in parts], Vocabulary.of(tokenizer), config)
    return [
        lay_out(write(Planned(samples, draws, config.mask_probability, Position())), planner)
        for samples, draws in planner.epoch()
    ]


class _Writer:
    """Samples to examples; sent to worker processes once."""

    def __init__(
        self, ids: Sequence[np.ndarray], vocabulary: Vocabulary, config: StreamConfig
    ) -> None:
        self.ids = [np.asarray(array) for array in ids]
        self.vocabulary, self.config = vocabulary, config
        self._sources = [_source(array) for array in ids]

    def __reduce__(self) -> Any:
        # what lies on disk is mapped again over there, not sent
        return _opened, (self._sources, self.vocabulary, self.config)

    def __call__(self, planned: Planned) -> Examples:
        return write_samples(
            self.ids,
            planned.samples,
            self.vocabulary,
            self.config.masking,
            planned.mask_probability,
            planned.draws,
            most_masked(self.config) if self.config.fixed_shapes else None,
        )


def _source(array: np.ndarray) -> Any:
    if isinstance(array, np.memmap):
        return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape)
    return np.asarray, (array,)


def _opened(sources: Sequence[Any], vocabulary: Vocabulary, config: StreamConfig) -> _Writer:
    return _Writer([make(*arguments) for make, arguments in sources], vocabulary, config)


_writer: _Writer | None = None


def _take(writer: _Writer) -> None:
    global _writer
    _writer = writer


def _write(planned: Planned) -> Examples:
    assert _writer is not None
    examples = _writer(planned)
    # half the bytes on the way back
    return replace(
        examples,
        input_ids=examples.input_ids.astype(np.int32),
        token_type_ids=examples.token_type_ids.astype(np.int8),
    )


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step
