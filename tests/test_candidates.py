from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import Targets
from fastbert.tasks.candidates import deal_candidates
from fastbert.tasks.losses import Shaping
from fastbert.tasks.rerank import Rerank
from fastbert.tasks.table import Row
from fastbert.tasks.task import Outputs


def rows_of(relevant: int, others: int, query: str = "river") -> list[Row]:
    """Passages of a query, the relevant ones first."""
    return [
        *(Row(query, "1", f"stone {number}") for number in range(relevant)),
        *(Row(query, "0", f"winter {number}") for number in range(others)),
    ]


def dealt(rows: list[Row], negatives: int) -> list[tuple[int, ...]]:
    found = deal_candidates(rows, [float(row.label) for row in rows], negatives)
    assert all(one.rows == tuple(rows[number] for number in one.numbers) for one in found)
    return [one.numbers for one in found]


@pytest.mark.parametrize(
    ("relevant", "others", "negatives"), [(1, 50, 7), (3, 20, 7), (7, 46, 7), (4, 5, 3), (2, 1, 7)]
)
def test_every_list_has_one_relevant_passage(relevant, others, negatives) -> None:
    found = dealt(rows_of(relevant, others), negatives)
    assert [numbers[0] for numbers in found] == list(range(relevant))
    for numbers in found:
        assert len(set(numbers)) == len(numbers) == 1 + min(negatives, others)
        assert all(number >= relevant for number in numbers[1:])
    taken = np.bincount([n - relevant for numbers in found for n in numbers[1:]], minlength=others)
    # as many of the others as there is room for
    assert taken.max() - taken.min() <= 1


def test_a_list_is_of_one_query_that_has_both_kinds() -> None:
    rows = [*rows_of(2, 0, "stone"), *rows_of(1, 2), *rows_of(0, 3, "garden")]
    mixed = [rows[number] for number in (5, 2, 0, 3, 6, 1, 4, 7)]
    found = dealt(mixed, 7)
    assert [(numbers[0], sorted(numbers[1:])) for numbers in found] == [(1, [3, 6])]


def test_the_others_are_no_first_ones_and_always_the_same() -> None:
    rows = rows_of(1, 50)
    [numbers] = dealt(rows, 7)
    assert [numbers] == dealt(rows, 7)
    # the hardest stand first in many files
    assert max(numbers[1:]) > 25


def test_lists_lose_among_their_own() -> None:
    task = Rerank(negatives=3)
    rows = [*rows_of(2, 3), *rows_of(1, 1, "garden"), *rows_of(1, 0, "window")]
    task.fit(rows)
    said: list[str] = []
    lists = task.examples(rows, "train", said.append)
    assert said == [
        "train: 1 of 8 passages in no list: more than --negatives 3 take, or no other kind beside"
    ]
    units = task.build(lists, tiny_tokenizer())
    # rows of the file, so that a run tells how many it trains on
    assert sorted(set(units.rows.tolist())) == list(range(7))
    order = [2, 0, 1]
    batch = units.batch(order)
    assert batch.num_labelled == 3
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(10, 1, generator=generator).double().requires_grad_()
    targets = Targets(0, 3)
    found = task.loss(Outputs(sequences=scores), batch, targets, Shaping())
    parts = scores[:, 0].split([2, 4, 4])
    expected = -torch.stack([part.log_softmax(0)[0] for part in parts]).mean()
    eps = 64 * torch.finfo(torch.float64).eps
    assert abs(found.total - expected) <= eps * expected
    assert int(found.correct) == sum(int(part.argmax()) == 0 for part in parts)
    # what all passages of a query have in common is not learnt
    found.total.backward()
    for part in scores.grad[:, 0].split([2, 4, 4]):
        assert abs(part.sum()) <= eps * part.abs().max()


def test_what_lists_need(tmp_path) -> None:
    apart = [Row("river", "1", "stone"), Row("garden", "0", "winter")]
    with pytest.raises(InputError, match=r"no query has .* --manner passages learns from each"):
        Rerank().fit(apart)
    alone = Rerank(manner="passages")
    alone.fit(apart)
    assert alone.examples(apart, "train", lambda _: None) is apart
    with pytest.raises(InputError, match="--manner must be one of lists, passages, got 'pairs'"):
        Rerank(manner="pairs")
    with pytest.raises(InputError, match="--negatives must be at least 1, got 0"):
        Rerank(negatives=0)


def test_a_step_takes_as_many_passages_in_either_manner() -> None:
    assert Rerank(manner="passages").units_a_step(32) == 32
    assert Rerank(negatives=7).units_a_step(32) == 4
    assert Rerank(negatives=50).units_a_step(32) == 1


def test_what_was_learnt_from_lists_is_no_probability() -> None:
    row, answer = Row("river", "1", "stone"), {"relevance": 0.4}
    assert Rerank(manner="passages").is_right(row, answer) is False
    assert Rerank().is_right(row, answer) is None
    facts = json.loads(json.dumps(Rerank(manner="passages").facts()))
    assert facts["manner"] == "passages"
