"""What each batch of a run holds, planned a window at a time without looking at the text.

1. An epoch shuffles the text's regions; a window takes the next few hundred.
2. Its regions are cut into samples, these shuffled and packed by best fit: the plan of some
   hundred batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastbert.data.draws import Draws
from fastbert.data.regions import Part, Regions
from fastbert.data.samples import Samples, plan_samples
from fastbert.data.stream import (
    MASKED_STEP,
    SEQUENCE_STEP,
    Position,
    StreamConfig,
    rounded_up,
    sequence_slots,
)
from fastbert.packing import Capacity, best_fit
from fastbert.tokenizer import Tokenizer

# batches a window holds; its last one may be part empty, so many make that small
WINDOW_BATCHES = 256
# how far above their share a batch's targets may be, for sequences round at random, by a token or
# by a unit of several: for single tokens six standard deviations of one sequence each
SPREAD_OF_TOKENS, SPREAD_OF_UNITS = 3.0, 16.0
_REGIONS, _SAMPLES, _BATCHES, _REPLAY = range(200, 204)


@dataclass
class Window:
    """A plan: samples, and which of them each batch holds."""

    samples: Samples
    batches: list[np.ndarray]
    draws: Draws


class Planner:
    """Plans windows.

    Args:
        parts: the text.
        tokenizer: of it.
        config: how text becomes batches.
        replay: older text, of which every window has `config.replay_share`. Its own epochs go on
            as it is used up, however often the text comes round.

    Attributes:
        sequences, masked: slots of every batch where shapes are fixed, the same wherever a run
            begins; None where they are not.
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
        self.sequences = self.masked = None
        if config.fixed_shapes:
            lengths = self._samples(0, 0).lengths
            self.sequences = sequence_slots(lengths, config.token_budget)
            dealt = [lengths[batch] for batch in self._packed(lengths)]
            self.masked = masked_slots(config, dealt, self.sequences)

    def window(self, epoch: int, number: int) -> Window:
        """Plan one of an epoch's `windows`."""
        draws = Draws(self.config.seed, epoch)
        samples = self._samples(epoch, number)
        batches = [np.sort(rows) for rows in self._packed(samples.lengths)]
        order = draws.of(_BATCHES).of(number).permutation(len(batches))
        return Window(samples, [batches[place] for place in order.tolist()], draws)

    def _samples(self, epoch: int, number: int) -> Samples:
        """A window's samples, shuffled."""
        draws = Draws(self.config.seed, epoch)
        edges = np.linspace(0, self.own, self.windows + 1).astype(np.int64)
        first, last = int(edges[number]), int(edges[number + 1])
        chosen = self._order(_REGIONS, epoch)[first:last]
        if self.replay_rate:
            replayed = self._replayed(epoch * self.own + first, epoch * self.own + last)
            chosen = np.concatenate([chosen, replayed])
        samples = plan_samples(self.regions, chosen, self.config.objective, draws)
        return samples[np.argsort(draws.of(_SAMPLES).words(samples.index), kind="stable")]

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
        if self.sequences is not None and self.masked is not None:
            return Capacity(budget, self.sequences, self.masked)
        return Capacity(
            tokens=budget,
            sequences=rounded_up(sequences, SEQUENCE_STEP),
            masked=rounded_up(masked, MASKED_STEP),
        )

    def _packed(self, lengths: np.ndarray) -> list[list[int]]:
        batches = best_fit(lengths, self.config.token_budget, self.sequences)
        _fill_last(batches, lengths, self.config.token_budget, self.sequences or len(lengths))
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


def masked_slots(config: StreamConfig, dealt: Sequence[np.ndarray], sequences: int) -> int:
    """Targets that a batch of fixed shape has room for; what chance brings beyond is left out.

    Args:
        config: the share of tokens that are targets.
        dealt: lengths of the sequences of each batch of the first window.
        sequences: slots of a batch.
    """
    share, added = config.most_masked, config.objective.added_tokens
    # a sequence has one target at least
    most = max(float(np.maximum(share * (lengths - added), 1.0).sum()) for lengths in dealt)
    spread = SPREAD_OF_TOKENS if config.masking == "token" else SPREAD_OF_UNITS
    room = max(most, share * config.token_budget) + spread * math.sqrt(sequences)
    return rounded_up(math.ceil(room), MASKED_STEP)
