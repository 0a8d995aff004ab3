"""Pre-training batches without end: plan an epoch, shuffle, mask, pack under a token budget.

1. An epoch cuts the corpus into samples and shuffles them: a function of (seed, epoch).
2. A window of samples is written out and masked: a function of (seed, epoch, window).
3. The window is packed by best fit and its batches are shuffled.
4. A thread prepares batches ahead of the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from fastbert.data.masking import STYLES
from fastbert.data.objectives import Objective, Samples, build_examples, plan_samples
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.packing import Capacity, Examples, PackedBatch, best_fit
from fastbert.tokenizer import Tokenizer

# batches a window holds; its last batch may be part empty, so many make that small
BATCHES_A_WINDOW = 48
# sizes that may vary come in steps, because a matrix library prepares code for every new shape
SEQUENCE_STEP, MASKED_STEP = 8, 64
# of one batch; more is a slip of the keyboard
MOST_TOKENS = 1 << 24
_PLAN, _WINDOW = 1, 2


@dataclass
class Position:
    """Where the stream stands: the next batch to come."""

    epoch: int = 0
    window: int = 0
    batch: int = 0


@dataclass(frozen=True)
class StreamConfig:
    """How text becomes batches."""

    objective: Objective
    # tokens a batch
    token_budget: int
    # tokens a sequence at most
    max_seq_len: int
    # share of tokens chosen for the masked-LM objective
    mask_probability: float = 0.15
    # at the end of a run of `steps` optimiser steps; None for the same throughout
    final_mask_probability: float | None = None
    steps: int | None = None
    # what is chosen as one: token, whole-word, ngram or span
    masking: str = "token"
    # of older text among the regions, where there is some
    replay_share: float = 0.0
    seed: int = 0
    # one shape for all batches, as compiled steps and CUDA graphs want; else few slots are unused
    fixed_shapes: bool = False

    @property
    def most_masked(self) -> float:
        """The largest share that is ever chosen."""
        return max(self.mask_probability, self.final_mask_probability or 0.0)

    def mask_probability_at(self, step: int) -> float:
        """The share in an optimiser step, straight from first to last (Ankner et al. 2023,
        arXiv:2305.15096)."""
        if self.final_mask_probability is None or self.steps is None:
            return self.mask_probability
        done = min(step / max(self.steps - 1, 1), 1.0)
        return self.mask_probability + done * (self.final_mask_probability - self.mask_probability)

    def __post_init__(self) -> None:
        if self.token_budget > MOST_TOKENS:
            raise InputError(
                f"--token-budget must be at most {MOST_TOKENS:,}, got {self.token_budget:,}"
            )
        if self.token_budget < self.max_seq_len:
            raise InputError(
                f"--token-budget must be at least --max-seq-len ({self.max_seq_len}), "
                f"got {self.token_budget}"
            )
        if self.max_seq_len < 8:
            raise InputError(f"--max-seq-len must be at least 8, got {self.max_seq_len}")
        for name in ("mask_probability", "final_mask_probability"):
            share = getattr(self, name)
            if share is not None and not 0.0 < share < 1.0:
                raise InputError(f"--{name.replace('_', '-')} must be in (0, 1), got {share}")
        if not 0.0 <= self.replay_share < 1.0:
            raise InputError(f"--replay-share must be in [0, 1), got {self.replay_share}")
        if self.masking not in STYLES:
            raise InputError(f"--masking must be one of {', '.join(STYLES)}, got {self.masking!r}")
        if self.final_mask_probability is not None and self.steps is None:
            raise InputError("--final-mask-probability needs --max-steps: time decides no batch")


class PretrainingStream:
    """Batches of one corpus; `position` names the batch that comes next."""

    def __init__(
        self,
        corpus: TokenizedCorpus,
        tokenizer: Tokenizer,
        config: StreamConfig,
        position: Position | None = None,
    ) -> None:
        if corpus.tokens == 0:
            raise InputError("no tokens to train on: the text is empty after tokenising")
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.config = config
        self.position = position or Position()
        self.sequences = None
        if config.fixed_shapes:
            samples, edges = self._plan(0)
            self.sequences = sequence_slots(samples.lengths[: edges[1]], config.token_budget)

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            yield from self.epoch_batches(self.position.epoch)
            self.position = Position(epoch=self.position.epoch + 1)

    def epoch_batches(self, epoch: int) -> Iterator[PackedBatch]:
        """The rest of an epoch from `position` on."""
        config = self.config
        samples, edges = self._plan(epoch)
        for window in range(self.position.window, len(edges) - 1):
            rng = np.random.default_rng([config.seed, epoch, _WINDOW, window])
            examples = build_examples(
                self.corpus,
                samples[np.arange(edges[window], edges[window + 1])],
                config.objective,
                self.tokenizer,
                config.mask_probability,
                rng,
            )
            examples.sample_ids = np.arange(edges[window], edges[window + 1])
            batches = best_fit(examples.lengths, config.token_budget, self.sequences)
            order = rng.permutation(len(batches))
            for number in range(self.position.batch, len(batches)):
                self.position = Position(epoch, window, number + 1)
                chosen = np.sort(batches[order[number]])
                batch = examples.batch(chosen, self._capacity(examples, chosen))
                if config.fixed_shapes:
                    # a compiled step is built for one value of it
                    batch.max_seqlen = config.max_seq_len
                    # of such batches kernels read rows and tiles
                    batch.layout.prepare()
                yield batch
            self.position = Position(epoch, window + 1, 0)

    def _plan(self, epoch: int) -> tuple[Samples, list[int]]:
        """An epoch's samples, shuffled, and where its windows begin."""
        config = self.config
        rng = np.random.default_rng([config.seed, epoch, _PLAN])
        samples = plan_samples(self.corpus, config.objective, config.max_seq_len, rng)
        samples = samples[rng.permutation(len(samples))]
        return samples, _window_edges(samples.lengths, config.token_budget * BATCHES_A_WINDOW)

    def _capacity(self, examples: Examples, chosen: np.ndarray) -> Capacity:
        """The stream is always as long as the budget; the rest is fixed, or a step of its size."""
        budget = self.config.token_budget
        if self.sequences is not None:
            # each sequence masks at most one token over its share
            masked = int(budget * self.config.mask_probability) + self.sequences
            return Capacity(budget, self.sequences, rounded_up(masked, MASKED_STEP))
        return Capacity(
            tokens=budget,
            sequences=rounded_up(len(chosen), SEQUENCE_STEP),
            masked=rounded_up(int(examples.num_masked[chosen].sum()), MASKED_STEP),
        )


def prefetch(
    stream: PretrainingStream, depth: int = 4
) -> Generator[tuple[PackedBatch, Position], None, None]:
    """Batches prepared by a thread, each with the position after it, for a resume.

    The thread has ended when the iterator is closed, or ends with the stream.
    """
    ready: queue.Queue[tuple[PackedBatch, Position] | BaseException | None] = queue.Queue(depth)
    closed = threading.Event()

    def produce() -> None:
        try:
            for batch in stream:
                _put(ready, (batch, stream.position), closed)
                if closed.is_set():
                    return
            _put(ready, None, closed)
        except BaseException as error:
            _put(ready, error, closed)

    thread = threading.Thread(target=produce, daemon=True, name="batches")
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        # one that outlives its process is torn out of torch's code, which then aborts
        thread.join()


def heldout_batches(
    corpus: TokenizedCorpus, tokenizer: Tokenizer, config: StreamConfig
) -> list[PackedBatch]:
    """One pass over held-out text with the same masks and pairs every time it is called."""
    return list(PretrainingStream(corpus, tokenizer, config).epoch_batches(0))


def _put(
    ready: queue.Queue[tuple[PackedBatch, Position] | BaseException | None],
    item: tuple[PackedBatch, Position] | BaseException | None,
    closed: threading.Event,
) -> None:
    while not closed.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _window_edges(lengths: np.ndarray, tokens: int) -> list[int]:
    """Cut the shuffled samples where each further `tokens`, or a little less, are reached."""
    # an eighth of a batch of slack: best fit needs no further batch for a few left over
    tokens -= tokens // (8 * BATCHES_A_WINDOW)
    total = np.cumsum(lengths)
    marks = np.arange(tokens, total[-1], tokens)
    return [0, *np.searchsorted(total, marks).tolist(), len(lengths)]


def sequence_slots(lengths: np.ndarray, budget: int) -> int:
    """Sequences that a batch of fixed shape has room for: few, and batches are as full as without.

    Args:
        lengths: of a run's first window, which stands for all: text is shuffled.
        budget: tokens a batch.
    """
    fewest = len(best_fit(lengths, budget))
    slots = SEQUENCE_STEP
    while slots * fewest < len(lengths) or len(best_fit(lengths, budget, slots)) > fewest:
        slots = rounded_up(slots + max(slots // 8, 1), SEQUENCE_STEP)
    return slots


def rounded_up(count: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-count // step) * step
