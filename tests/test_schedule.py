from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import InputError
from fastbert.training.schedule import (
    DECAY_SHARE,
    SCHEDULES,
    Budget,
    constant,
    cosine,
    learning_rate_factor,
    linear,
    warmup_stable_decay,
)

quickly = settings(deadline=None, derandomize=True, max_examples=50)
WARMUPS = [0.0, 0.06, 0.25]
# powers of two, so that the values below are exact
HALF = 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_at_the_edges(name):
    schedule = SCHEDULES[name]
    for warmup in WARMUPS[1:]:
        assert schedule(0.0, warmup) == 0.0
        assert schedule(warmup, warmup) == 1.0
        assert schedule(warmup / 2, warmup) == HALF
    assert schedule(0.0, 0.0) == 1.0
    assert schedule(1.0, 0.25) == (1.0 if schedule is constant else 0.0)


def test_values_between():
    assert linear(0.625, 0.25) == HALF
    assert math.isclose(cosine(0.625, 0.25), HALF)
    assert math.isclose(cosine(0.25 + 0.75 / 3, 0.25), 0.75)
    assert constant(0.9, 0.25) == 1.0
    assert warmup_stable_decay(1.0 - DECAY_SHARE, 0.25) == 1.0
    assert math.isclose(warmup_stable_decay(1.0 - DECAY_SHARE / 2, 0.25), HALF)


@quickly
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from(WARMUPS),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_up_over_the_warm_up_then_never_up_again(name, warmup, one, other):
    earlier, later = sorted((one, other))
    before, after = (learning_rate_factor(name, p, warmup) for p in (earlier, later))
    assert 0.0 <= before <= 1.0 and 0.0 <= after <= 1.0
    if later <= warmup:
        assert before <= after
    elif earlier >= warmup:
        assert before >= after


def test_a_budget_of_steps():
    budget = Budget(max_steps=8)
    assert [budget.progress(step, 1e9) for step in (0, 2, 8, 9)] == [0.0, 0.25, 1.0, 1.0]


def test_a_budget_of_time():
    budget = Budget(max_minutes=0.5)
    assert [budget.progress(10**9, s) for s in (0.0, 7.5, 30.0, 31.0)] == [0.0, 0.25, 1.0, 1.0]


def test_whichever_comes_first():
    budget = Budget(max_steps=8, max_minutes=1.0)
    assert budget.progress(4, 15.0) == 0.5
    assert budget.progress(2, 45.0) == 0.75


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "a run needs an end: give --max-steps or --max-minutes"),
        ({"max_steps": 0}, "--max-steps must be more than 0, got 0"),
        ({"max_steps": -3}, "--max-steps must be more than 0, got -3"),
        ({"max_minutes": 0.0}, "--max-minutes must be more than 0, got 0.0"),
        ({"max_steps": 3, "max_minutes": math.nan}, "--max-minutes must be more than 0, got nan"),
    ],
)
def test_a_budget_without_end(fields, message):
    with pytest.raises(InputError, match=message):
        Budget(**fields)
