from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_examples

from fastbert.data.epochs import TOKEN_STEP, EpochStream, snug_capacity
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.packing import IGNORE_INDEX


def examples(count: int, seed: int = 0):
    lengths = np.random.default_rng(seed).integers(1, 40, count).tolist()
    return tiny_examples(lengths, masked=False)


@given(count=st.integers(1, 70), batch_size=st.integers(1, 40), accumulation=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_epoch_deals_every_example_once_and_evenly(count, batch_size, accumulation) -> None:
    steps = -(-count // batch_size)
    if accumulation > count // steps:
        with pytest.raises(InputError, match="--accumulation must be at most"):
            EpochStream(examples(count), batch_size, accumulation)
        return
    stream = EpochStream(examples(count), batch_size, accumulation)
    dealt = stream.deal(epoch=3)
    assert stream.steps == steps and len(dealt) == steps * accumulation
    assert sorted(np.concatenate(dealt).tolist()) == list(range(count))
    sizes = [
        sum(map(len, dealt[first : first + accumulation]))
        for first in range(0, len(dealt), accumulation)
    ]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert min(map(len, dealt)) >= 1


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(EpochStream(examples(50), 8, seed=seed).deal(epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_accumulation_deals_the_same_steps() -> None:
    whole = EpochStream(examples(50), 8).deal(2)
    parts = EpochStream(examples(50), 8, accumulation=3).deal(2)
    joined = [np.concatenate(parts[first : first + 3]) for first in range(0, len(parts), 3)]
    assert [step.tolist() for step in whole] == [step.tolist() for step in joined]


def test_a_resumed_epoch_gives_the_batches_that_were_left() -> None:
    stream = EpochStream(examples(50), 8, accumulation=2, seed=1)
    whole = list(stream.epoch_batches(Position(epoch=4)))
    _, position = whole[4]
    rest = list(stream.epoch_batches(position))
    assert [p for _, p in rest] == [p for _, p in whole[5:]]
    for (ours, _), (expected, _) in zip(rest, whole[5:], strict=True):
        assert torch.equal(ours.input_ids, expected.input_ids)
        assert torch.equal(ours.sequence_labels, expected.sequence_labels)
    assert list(stream.epoch_batches(whole[-1][1])) == []


def test_batches_hold_their_examples() -> None:
    these = examples(21)
    stream = EpochStream(these, 8)
    for chosen, (batch, _) in zip(stream.deal(0), stream.epoch_batches(Position()), strict=True):
        ids = np.concatenate(
            [these.input_ids[these.cu_seqlens[i] : these.cu_seqlens[i + 1]] for i in chosen]
        )
        assert batch.input_ids[: batch.num_tokens].tolist() == ids.tolist()
        assert batch.sequence_labels.tolist() == these.sequence_labels[chosen].tolist()
        assert batch.num_labelled == len(chosen) == batch.num_sequences
        assert IGNORE_INDEX not in batch.sequence_labels
        assert batch.capacity % TOKEN_STEP == 0
        assert 0 <= batch.capacity - batch.num_tokens < TOKEN_STEP


def test_snug_capacity_is_the_next_step() -> None:
    assert snug_capacity(np.array([TOKEN_STEP])).tokens == TOKEN_STEP
    assert snug_capacity(np.array([TOKEN_STEP, 1])).tokens == 2 * TOKEN_STEP
    assert snug_capacity(np.array([3, 4])).sequences == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "--batch-size must be at least 1, got 0"), ((4, 0), "--accumulation must be at least")],
)
def test_sizes_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        EpochStream(examples(9), *arguments)


def test_fixed_shapes_are_one_shape_an_epoch_and_the_same_tokens():
    these = examples(50)
    fixed, snug = EpochStream(these, 8, fixed_shapes=True), EpochStream(these, 8)
    shapes = set()
    for epoch in range(3):
        ours, plain = (
            [batch for batch, _ in stream.epoch_batches(Position(epoch))]
            for stream in (fixed, snug)
        )
        assert len({batch.shapes() for batch in ours}) == 1
        shapes |= {batch.shapes() for batch in ours}
        for left, right in zip(ours, plain, strict=True):
            assert left.num_tokens == right.num_tokens
            rows = slice(left.num_tokens)
            assert torch.equal(left.input_ids[rows], right.input_ids[rows])
    # a graph serves the whole run
    assert len(shapes) <= 2
