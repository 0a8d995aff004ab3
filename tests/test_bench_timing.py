"""Interleaved timing under a clock of our own, so that every figure is exact."""

from __future__ import annotations

import pytest

from fastbert.bench.timing import Spread, interleaved_ms, speedup, spread


class Clock:
    """Stands still except for what the steps take."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []

    def step(self, name: str, *seconds: float):
        durations = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now_s += next(durations)

        return run


def test_steps_are_taken_in_turn_and_warm_up_does_not_count():
    clock = Clock()
    steps = {"a": clock.step("a", 64, 1, 2), "b": clock.step("b", 128, 4, 8)}
    times = interleaved_ms(steps, repeats=2, warm_up=1, clock=lambda: clock.now_s)
    assert clock.calls == ["a", "b"] * 3
    assert times == {"a": [1000.0, 2000.0], "b": [4000.0, 8000.0]}


def test_the_device_is_idle_before_and_after_each_step():
    clock = Clock()
    interleaved_ms(
        {"a": clock.step("a", 1), "b": clock.step("b", 1)},
        repeats=1,
        warm_up=0,
        synchronise=lambda: clock.calls.append("idle"),
        clock=lambda: clock.now_s,
    )
    assert clock.calls == ["idle", "a", "idle", "idle", "b", "idle"]


def test_waiting_for_the_device_counts():
    clock = Clock()
    waits = iter([0.0, 2.0])

    def synchronise() -> None:
        clock.now_s += next(waits)

    times = interleaved_ms(
        {"a": clock.step("a", 1)},
        repeats=1,
        warm_up=0,
        synchronise=synchronise,
        clock=lambda: clock.now_s,
    )
    assert times == {"a": [3000.0]}


def test_spread_names_median_and_ends():
    assert spread([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)


def test_speedup_is_the_ratio_of_medians_and_its_ends_are_of_one_round():
    # round by round 8, 2 and 4; the medians are 16 and 4
    assert speedup([16.0, 8.0, 32.0], [2.0, 4.0, 8.0]) == Spread(4.0, 2.0, 8.0)


def test_speedup_needs_the_same_rounds():
    with pytest.raises(ValueError):
        speedup([1.0, 2.0], [1.0])
