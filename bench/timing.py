"""Timing of rivals side by side: taken in turn, so that what disturbs one disturbs the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Step = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """A median and how far the repeats lay from it."""

    median: float
    lowest: float
    highest: float


def interleaved_ms(
    steps: Mapping[str, Step],
    *,
    repeats: int,
    warm_up: int = 2,
    synchronise: Step = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every step, A B A B, in the order of `steps`.

    Args:
        steps: by name.
        repeats: rounds that count.
        warm_up: rounds before them that do not.
        synchronise: waits until the device is idle; called before and after each step.
        clock: seconds.

    Returns:
        Per name one time a round: entry i of every list was taken in the same round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + repeats):
        for name, step in steps.items():
            synchronise()
            start = clock()
            step()
            synchronise()
            if number >= warm_up:
                times[name].append(1000.0 * (clock() - start))
    return times


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(statistics.median(values), min(values), max(values))


def speedup(slower_ms: Sequence[float], faster_ms: Sequence[float]) -> Spread:
    """Ratio of the medians; the lowest and highest are ratios within one round."""
    rounds = [slow / fast for slow, fast in zip(slower_ms, faster_ms, strict=True)]
    ratio = statistics.median(slower_ms) / statistics.median(faster_ms)
    return Spread(ratio, min(rounds), max(rounds))
