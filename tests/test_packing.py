from __future__ import annotations

import bisect
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_examples

from fastbert.packing import (
    IGNORE_INDEX,
    Capacity,
    Examples,
    PackedBatch,
    best_fit,
    pack,
    unpack,
)

quickly = settings(deadline=None, derandomize=True, max_examples=50)
LENGTHS = st.lists(st.integers(0, 60), max_size=40)


@quickly
@given(LENGTHS, st.integers(60, 130), st.one_of(st.none(), st.integers(1, 6)))
@example([], 60, None)
@example([60] * 5, 60, None)
@example([0, 0, 0], 60, 2)
def test_best_fit_keeps_its_promises(lengths, budget, most):
    batches = best_fit(lengths, budget, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in batch) <= budget for batch in batches)
    assert all(batch for batch in batches)
    assert most is None or all(len(batch) <= most for batch in batches)


@quickly
@given(LENGTHS, st.integers(60, 130))
def test_best_fit_decreasing_takes_the_fullest_batch(lengths, budget):
    """The definition, the slow way: every batch looked at for every sequence."""
    free: list[int] = []
    chosen: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [number for number, room in enumerate(free) if room >= lengths[index]]
        if not fitting:
            free.append(budget)
            chosen.append([])
            fitting = [len(free) - 1]
        fullest = min(fitting, key=lambda number: free[number])
        free[fullest] -= lengths[index]
        chosen[fullest].append(index)
    ours = best_fit(lengths, budget)
    assert [sorted(lengths[i] for i in b) for b in ours] == [
        sorted(lengths[i] for i in b) for b in chosen
    ]


def test_best_fit_fills_batches_of_real_lengths(data):
    text = (data / "pretrain" / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    lengths = [min(len(line.split()) + 2, 512) for line in text.splitlines() if line.strip()]
    for budget in (2048, 4096, 16384):
        batches = best_fit(lengths, budget)
        full = sum(sum(lengths[i] for i in b) for b in batches[:-1])
        assert full >= 0.98 * budget * (len(batches) - 1)


def test_best_fit_fills_batches_of_log_normal_lengths():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.5, 0.7, 20_000).astype(int), 3, 128)
    batches = best_fit(lengths, 4096)
    assert lengths.sum() >= 0.98 * 4096 * len(batches)


def test_best_fit_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match="a sequence of 11 tokens exceeds the budget 10"):
        best_fit([3, 11], 10)


def sequences_of(batch: PackedBatch) -> list[tuple]:
    """What each sequence of a batch holds, read back through cu_seqlens."""
    bounds = batch.cu_seqlens.tolist()
    found = []
    for number in range(batch.num_sequences):
        start, end = bounds[number], bounds[number + 1]
        rows = slice(start, end)
        assert torch.equal(batch.position_ids[rows], torch.arange(end - start))
        targets = []
        if batch.masked_positions is not None:
            real = batch.labels != IGNORE_INDEX
            inside = real & (batch.masked_positions >= start) & (batch.masked_positions < end)
            targets = list(
                zip(
                    (batch.masked_positions[inside] - start).tolist(),
                    batch.labels[inside].tolist(),
                    strict=True,
                )
            )
        label = None if batch.sequence_labels is None else int(batch.sequence_labels[number])
        found.append(
            (batch.input_ids[rows].tolist(), batch.token_type_ids[rows].tolist(), targets, label)
        )
    return found


def sequences_in(examples: Examples) -> list[tuple]:
    found = []
    for number in range(len(examples)):
        start, end = examples.cu_seqlens[number : number + 2].tolist()
        targets = [
            (int(position) - start, int(label))
            for position, label in zip(examples.masked_positions, examples.labels, strict=True)
            if start <= position < end
        ]
        found.append(
            (
                examples.input_ids[start:end].tolist(),
                examples.token_type_ids[start:end].tolist(),
                targets,
                int(examples.sequence_labels[number]),
            )
        )
    return found


@quickly
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_a_batch_holds_the_chosen_sequences_in_their_order(lengths, random):
    examples = tiny_examples(lengths)
    chosen = random.sample(range(len(lengths)), random.randint(0, len(lengths)))
    expected = [sequences_in(examples)[index] for index in chosen]
    snug = examples.batch(chosen)
    assert sequences_of(snug) == expected
    assert snug.capacity == snug.num_tokens == sum(lengths[i] for i in chosen)
    assert snug.num_sequences == len(chosen)
    assert snug.max_seqlen == max((lengths[i] for i in chosen), default=0)
    assert snug.num_masked == len(snug.labels) == sum(len(targets) for *_, targets, _ in expected)
    assert snug.num_labelled == len(chosen)
    roomy = examples.batch(chosen, Capacity(snug.capacity + 7, len(chosen) + 3, 40))
    assert sequences_of(roomy) == expected


def test_unused_slots_are_harmless():
    batch = tiny_examples([5, 9]).batch([1, 0], Capacity(20, 6, 10))
    assert batch.cu_seqlens.tolist() == [0, 9, 14, 14, 14, 14, 14]
    assert batch.input_ids.shape == batch.position_ids.shape == batch.token_type_ids.shape == (20,)
    assert not batch.input_ids[14:].any() and not batch.position_ids[14:].any()
    assert batch.masked_positions.shape == batch.labels.shape == (10,)
    assert batch.labels[4:].tolist() == [IGNORE_INDEX] * 6
    assert batch.sequence_labels[2:].tolist() == [IGNORE_INDEX] * 4
    assert (batch.num_tokens, batch.num_sequences) == (14, 2)
    assert (batch.num_masked, batch.num_labelled) == (4, 2)
    assert batch.first_tokens.max() < batch.capacity


def test_dtypes():
    batch = tiny_examples([5, 9]).batch([0, 1], Capacity(20, 6, 10))
    assert batch.cu_seqlens.dtype == torch.int32
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor) and field.name != "cu_seqlens":
            assert value.dtype == torch.int64, field.name


@pytest.mark.parametrize(
    "capacity, message",
    [
        (Capacity(13, 2, 9), "14 tokens in 2 sequences exceed the capacity of 13 and 2"),
        (Capacity(14, 1, 9), "14 tokens in 2 sequences exceed the capacity of 14 and 1"),
        (Capacity(14, 2, 3), "4 masked positions exceed the capacity of 3"),
    ],
)
def test_what_exceeds_the_capacity(capacity, message):
    with pytest.raises(ValueError, match=message):
        tiny_examples([5, 9]).batch([0, 1], capacity)


def test_labels_without_a_target_are_not_counted():
    examples = Examples.from_lists([[1, 2], [3], [4]], sequence_labels=[1, IGNORE_INDEX, 0])
    assert examples.batch([0, 1, 2]).num_labelled == 2


def test_no_examples():
    examples = Examples.from_lists([])
    assert len(examples) == 0 and examples.lengths.tolist() == []
    batch = examples.batch([], Capacity(4, 2, 0))
    assert batch.num_tokens == 0 and batch.cu_seqlens.tolist() == [0, 0, 0]


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = tiny_examples([5, 9]).batch([0, 1])
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.is_meta and after.shape == before.shape, field.name
        else:
            assert after == before, field.name


padded_batches = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@quickly
@given(padded_batches)
def test_pack_and_unpack_are_a_round_trip(mask):
    attention_mask = torch.tensor(mask)
    batch_size, length = attention_mask.shape
    input_ids = torch.arange(1, batch_size * length + 1).view(batch_size, length)
    types = input_ids % 2
    batch, rows = pack(input_ids, attention_mask, types)
    assert batch.num_sequences == batch_size
    assert batch.num_tokens == batch.capacity == int(attention_mask.sum())
    assert batch.cu_seqlens.tolist() == [
        0,
        *attention_mask.sum(dim=1).cumsum(0).tolist(),
    ]
    assert torch.equal(
        unpack(batch.input_ids, rows, (batch_size, length)), input_ids * attention_mask
    )
    assert torch.equal(
        unpack(batch.token_type_ids, rows, (batch_size, length)), types * attention_mask
    )
    columns = torch.arange(length).expand(batch_size, length)
    assert torch.equal(batch.position_ids, columns[attention_mask])
    owner = torch.tensor(
        [bisect.bisect_right(batch.cu_seqlens.tolist(), row) - 1 for row in range(len(rows))]
    )
    assert torch.equal(owner.long(), rows // length)


def test_pack_without_mask_takes_every_token():
    batch, rows = pack(torch.ones(2, 3, dtype=torch.int64), None)
    assert batch.num_tokens == 6 and rows.tolist() == list(range(6))
    assert not batch.token_type_ids.any()


def test_unpack_keeps_further_dimensions():
    states = torch.randn(3, 2, 5)
    padded = unpack(states, torch.tensor([0, 4, 5]), (2, 3))
    assert padded.shape == (2, 3, 2, 5)
    assert torch.equal(padded.flatten(0, 1)[[0, 4, 5]], states)
    assert not padded.flatten(0, 1)[[1, 2, 3]].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3),), r"input_ids must be \[batch, length\], got \[3\]"),
        ((torch.ones(2, 3), torch.ones(2, 2)), r"attention_mask must be \[2, 3\], got \[2, 2\]"),
        ((torch.ones(2, 3), None, torch.ones(6)), r"token_type_ids must be \[2, 3\], got \[6\]"),
    ],
)
def test_pack_refuses_shapes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack(*arguments, *[None] * (2 - len(arguments)))
