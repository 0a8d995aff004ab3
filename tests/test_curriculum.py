"""What grows over a run: every figure a function of the step, every resume exact."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tiny import tiny_corpus, tiny_tokenizer

from fastbert.data.curriculum import Curriculum
from fastbert.data.loader import Loader
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part
from fastbert.data.stream import Position, StreamConfig
from fastbert.errors import InputError

CONFIG = StreamConfig(Objective("sop"), token_budget=256, max_seq_len=64, seed=3)
GROWS = Curriculum(64, 4, steps=10, first_seq_len=24, first_accumulation=2, first_share=0.6)


def taken(curriculum: Curriculum, step: int, position: Position, groups: int, **deal) -> list:
    """The batches of so many groups, each with the position after it."""
    parts = [Part.whole(tiny_corpus())]
    with Loader(
        parts, tiny_tokenizer(), CONFIG, position, step=step, curriculum=curriculum, **deal
    ) as loader:
        ranks = deal.get("ranks", 1)
        return [
            list(islice(loader, -(-curriculum.accumulation_at(number) // ranks)))
            for number in range(step, step + groups)
        ]


def longest(group: list) -> int:
    return max(int(batch.cu_seqlens.diff().max()) for batch, _ in group)


def alike(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels) and p == q
        for (a, p), (b, q) in zip(left, right, strict=True)
    )


def test_lengths_and_batches_grow_when_they_should():
    groups = taken(GROWS, 0, Position(), 10)
    assert [len(group) for group in groups] == [2] * 6 + [4] * 4
    assert max(longest(group) for group in groups[:6]) <= 24
    assert all(longest(group) > 24 for group in groups[6:])
    assert max(longest(group) for group in groups) <= 64
    # the first step at full length begins an epoch
    assert groups[6][0][1] == Position(groups[5][-1][1].epoch + 1, 0, 4)


@pytest.mark.parametrize("workers, steps", [(0, (3, 5, 6, 7, 9)), (1, (4,))])
def test_any_group_is_reached_at_once(workers, steps):
    groups = taken(GROWS, 0, Position(), 10)
    for step in steps:
        position = groups[step - 1][-1][1]
        found = taken(GROWS, step, position, 10 - step, workers=workers)
        assert all(alike(a, b) for a, b in zip(found, groups[step:], strict=True))


def test_ranks_share_what_one_takes():
    alone = taken(GROWS, 0, Position(), 10)
    ranks = [taken(GROWS, 0, Position(), 10, rank=rank, ranks=2) for rank in range(2)]
    for number, group in enumerate(alone):
        dealt = [batch for pair in zip(*(r[number] for r in ranks), strict=True) for batch in pair]
        assert alike(dealt, group)


def test_a_ramp_is_straight():
    ramp = Curriculum(64, 9, steps=100, first_accumulation=1, ramp_share=0.5)
    sizes = [ramp.accumulation_at(step) for step in range(100)]
    assert sizes[0] == 1 and sizes[25] == 5 and sizes[50:] == [9] * 50
    assert sizes == sorted(sizes)
    assert abs(sum(sizes) / 100 - ramp.mean_accumulation) < 0.1
    jump = Curriculum(64, 8, steps=100, first_accumulation=2, first_share=0.75)
    assert sum(jump.accumulation_at(step) for step in range(100)) == 100 * jump.mean_accumulation


def test_without_growth_nothing_grows():
    even = Curriculum(64, 3)
    assert {(even.seq_len_at(n), even.accumulation_at(n)) for n in range(50)} == {(64, 3)}
    assert even.mean_accumulation == 3.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"first_seq_len": 65, "steps": 9}, r"--first-seq-len must be 1 to --max-seq-len \(64\)"),
        ({"first_seq_len": 7, "steps": 9}, "--first-seq-len must be at least 8, got 7"),
        ({"first_accumulation": 0, "steps": 9}, "--first-accumulation must be 1 to"),
        ({"first_accumulation": 2}, "--first-accumulation needs --max-steps: time decides no"),
        ({"first_seq_len": 32}, "--first-seq-len needs --max-steps"),
        ({"first_share": 1.5}, r"--first-share must be in \[0, 1\], got 1.5"),
        ({"ramp_share": 0.5}, "--ramp-share: --first-accumulation says what the batch grows from"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        Curriculum(64, 4, **fields)
