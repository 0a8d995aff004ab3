from __future__ import annotations

import dataclasses
import itertools
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import random_corpus, tiny_corpus, tiny_tokenizer

from fastbert.data import plan
from fastbert.data import stream as module
from fastbert.data.loader import one_pass
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part
from fastbert.data.stream import (
    Position,
    PretrainingStream,
    StreamConfig,
    heldout_batches,
    prefetch,
)
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.packing import IGNORE_INDEX, PackedBatch, best_fit

CONFIG = StreamConfig(Objective("sop"), token_budget=512, max_seq_len=64, seed=1)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "BATCHES_A_WINDOW", 5)


def stream(position: Position | None = None, **changes) -> PretrainingStream:
    config = dataclasses.replace(CONFIG, **changes)
    return PretrainingStream(tiny_corpus(), tiny_tokenizer(), config, position)


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in (
            (getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    )


def an_epoch(source: PretrainingStream) -> list[PackedBatch]:
    return list(source.epoch_batches(0))


def test_the_corpus_here_has_several_windows():
    source = stream()
    windows = set()
    for _ in source.epoch_batches(0):
        windows.add(source.position.window)
    assert len(windows) >= 3


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_position_resumes_exactly(fixed_shapes):
    source = stream(fixed_shapes=fixed_shapes)
    epoch = len(an_epoch(stream(fixed_shapes=fixed_shapes)))
    batches, positions = [], [source.position]
    for batch in islice(source, 2 * epoch + 3):
        batches.append(batch)
        positions.append(source.position)
    # inside a window, at its end, at the end of an epoch, in the next
    for start in (0, 1, 4, 5, 6, epoch - 1, epoch, epoch + 1, 2 * epoch):
        resumed = stream(positions[start], fixed_shapes=fixed_shapes)
        for expected, actual in zip(batches[start : start + 6], resumed, strict=False):
            assert same(expected, actual)


def test_positions_are_counted():
    source = stream()
    iterator = iter(source)
    next(iterator)
    assert source.position == Position(0, 0, 1)
    epoch = len(an_epoch(stream()))
    for _ in range(epoch):
        next(iterator)
    assert source.position.epoch == 1 and source.position.batch == 1


def contents(batches: list[PackedBatch]) -> list[tuple[int, ...]]:
    """Every sequence's unmasked tokens, sorted."""
    found = []
    for batch in batches:
        ids = batch.input_ids.clone()
        real = batch.labels != IGNORE_INDEX
        ids[batch.masked_positions[real]] = batch.labels[real]
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds[: batch.num_sequences + 1]):
            found.append(tuple(ids[start:end].tolist()))
    return sorted(found)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_an_epoch_holds_every_planned_sequence_once(fixed_shapes):
    source = stream(objective=Objective(), fixed_shapes=fixed_shapes)
    found = contents(an_epoch(source))
    tokenizer = tiny_tokenizer()
    words = [token for ids in found for token in ids]
    assert sum(len(ids) - 2 for ids in found) == tiny_corpus().tokens
    expected = np.bincount(tiny_corpus().ids, minlength=tokenizer.vocab_size)
    expected[[tokenizer.cls_id, tokenizer.sep_id]] += len(found)
    assert np.array_equal(np.bincount(words, minlength=tokenizer.vocab_size), expected)


def test_epochs_differ_and_seeds_differ():
    first = contents(an_epoch(stream()))
    assert first == contents(an_epoch(stream()))
    assert first != contents(list(stream(Position(epoch=1)).epoch_batches(1)))
    assert first != contents(an_epoch(stream(seed=2)))


def test_an_epoch_is_shuffled():
    ids = [batch.input_ids for batch in an_epoch(stream())]
    other = [batch.input_ids for batch in stream(Position(epoch=1)).epoch_batches(1)]
    assert not torch.equal(ids[0], other[0])
    lengths = [batch.num_sequences for batch in an_epoch(stream())]
    # best fit opens batches with the longest sequences: shuffled, the first are no rule
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_fixed_shapes_never_vary(objective):
    source = stream(objective=Objective.parse(objective), fixed_shapes=True, mask_probability=0.4)
    shapes = set()
    for batch in an_epoch(source):
        shapes.add(
            tuple(
                (f.name, tuple(value.shape))
                for f in dataclasses.fields(batch)
                if isinstance(value := getattr(batch, f.name), torch.Tensor)
            )
        )
        assert batch.max_seqlen == 64
    assert len(shapes) == 1


def test_fixed_shapes_keep_their_promise_for_the_shortest_text():
    """Nothing but sequences of a token or two: there are slots for as many as the budget holds."""
    corpus = TokenizedCorpus(
        ids=np.full(900, 9, dtype=np.uint16),
        sentence_starts=np.arange(901),
        document_starts=np.arange(901),
    )
    config = dataclasses.replace(CONFIG, fixed_shapes=True, mask_probability=0.01)
    batches = list(PretrainingStream(corpus, tiny_tokenizer(), config).epoch_batches(0))
    assert sum(batch.num_sequences for batch in batches) == 900
    assert len({batch.cu_seqlens.shape for batch in batches}) == 1
    assert len(batches) == -(-900 * 3 // 512)


def test_slots_are_few_and_cost_no_batch():
    rng = np.random.default_rng(0)
    # a third is short, as sentences alone are
    lengths = np.where(rng.random(4000) < 0.3, rng.integers(3, 40, 4000), 128)
    fewest = len(best_fit(lengths, 4096))
    slots = module.sequence_slots(lengths, 4096)
    assert slots % module.SEQUENCE_STEP == 0
    assert len(best_fit(lengths, 4096, slots)) == fewest
    assert len(best_fit(lengths, 4096, int(slots / 1.25))) > fewest
    assert module.sequence_slots(np.full(4000, 128), 4096) == 32


@pytest.mark.parametrize("kind", ["stream", "loader"])
def test_a_batch_that_runs_out_of_slots_is_closed(kind, monkeypatch):
    """The first window stands for all, and another may be of shorter sequences."""
    for file in (module, plan):
        monkeypatch.setattr(file, "sequence_slots", lambda lengths, budget: 8)
    config = dataclasses.replace(CONFIG, fixed_shapes=True)
    free = dataclasses.replace(CONFIG, fixed_shapes=False)
    counts = []
    for settings in (config, free):
        if kind == "stream":
            source = PretrainingStream(tiny_corpus(), tiny_tokenizer(), settings)
            batches = list(source.epoch_batches(0))
        else:
            batches = one_pass([Part.whole(tiny_corpus())], tiny_tokenizer(), settings)
        counts.append([batch.num_sequences for batch in batches])
    assert max(counts[0]) == 8 < max(counts[1])
    assert sum(counts[0]) == sum(counts[1]) and len(counts[0]) > len(counts[1])


def test_sizes_come_in_steps():
    for batch in an_epoch(stream()):
        assert batch.capacity == 512
        slots = len(batch.cu_seqlens) - 1
        assert slots % module.SEQUENCE_STEP == 0 and slots - batch.num_sequences < 8
        assert len(batch.labels) % module.MASKED_STEP == 0
        assert len(batch.labels) - batch.num_masked < module.MASKED_STEP


def test_batches_are_full(monkeypatch):
    monkeypatch.undo()
    config = StreamConfig(Objective("sop"), token_budget=4096, max_seq_len=128)
    source = PretrainingStream(random_corpus(2600), tiny_tokenizer(), config)
    tokens = [batch.num_tokens for batch in source.epoch_batches(0)]
    # of a window, one batch may be part empty
    full = sorted(tokens)[source.position.window :]
    assert len(tokens) > 100
    assert sum(full) >= 0.98 * 4096 * len(full)
    assert sum(tokens) >= 0.97 * 4096 * len(tokens)


def test_no_batch_inside_an_epoch_is_nearly_empty(monkeypatch):
    monkeypatch.setattr(module, "BATCHES_A_WINDOW", 48)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.2, 0.6, 60_000).astype(np.int64) + 8, 128)
    edges = module._window_edges(lengths, 48 * 2048)
    assert edges[0] == 0 and edges[-1] == len(lengths) and edges == sorted(edges)
    for start, end in itertools.pairwise(edges[:-1]):
        batches = best_fit(lengths[start:end], 2048)
        # an optimiser that scales its steps would turn a handful of tokens into a full one
        assert min(int(lengths[start:end][batch].sum()) for batch in batches) > 2048 / 2


def test_heldout_batches_are_always_the_same():
    first, again = (heldout_batches(tiny_corpus(), tiny_tokenizer(), CONFIG) for _ in range(2))
    assert len(first) == len(again) > 1
    for left, right in zip(first, again, strict=True):
        assert same(left, right)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetching_changes_nothing(depth):
    source = stream()
    ahead = prefetch(stream(), depth)
    for expected, (batch, position) in zip(islice(source, 14), ahead, strict=False):
        assert same(expected, batch)
        assert position == source.position
    assert threads()
    ahead.close()
    assert not threads()


def test_prefetched_positions_resume():
    ahead = prefetch(stream())
    taken = list(islice(ahead, 7))
    ahead.close()
    resumed = prefetch(stream(taken[3][1]))
    for (expected, after), (batch, position) in zip(taken[4:], resumed, strict=False):
        assert same(expected, batch) and position == after
    resumed.close()


class Breaking(PretrainingStream):
    """Yields two batches, then fails."""

    def __iter__(self):
        yield from islice(super().__iter__(), 2)
        raise InputError("the text went away")


def test_prefetching_hands_exceptions_on():
    ahead = prefetch(Breaking(tiny_corpus(), tiny_tokenizer(), CONFIG))
    next(ahead)
    next(ahead)
    with pytest.raises(InputError, match="the text went away"):
        next(ahead)
    assert not threads()


class Ending(PretrainingStream):
    """Yields two batches and ends."""

    def __iter__(self):
        yield from islice(super().__iter__(), 2)


def test_prefetching_ends_where_the_stream_does():
    ahead = prefetch(Ending(tiny_corpus(), tiny_tokenizer(), CONFIG))
    assert len(list(ahead)) == 2
    assert not threads()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"token_budget": 63}, r"--token-budget must be at least --max-seq-len \(64\), got 63"),
        ({"max_seq_len": 7}, "--max-seq-len must be at least 8, got 7"),
        ({"mask_probability": 0.0}, r"--mask-probability must be in \(0, 1\), got 0.0"),
        ({"mask_probability": 1.0}, r"--mask-probability must be in \(0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_an_empty_corpus():
    empty = TokenizedCorpus(np.zeros(0, np.uint16), np.zeros(1, np.int64), np.zeros(1, np.int64))
    with pytest.raises(InputError, match="no tokens to train on"):
        PretrainingStream(empty, tiny_tokenizer(), CONFIG)
