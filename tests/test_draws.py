from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fastbert.data.draws import Draws


def five_sigma(mean: float, expected: float, deviation: float, count: int) -> bool:
    return abs(mean - expected) <= 5 * deviation / math.sqrt(count)


def test_a_draw_is_a_function_of_its_coordinates():
    index = np.arange(1000)
    first = Draws(3, 1, 7).words(index, 5)
    assert np.array_equal(first, Draws(3, 1, 7).words(index, 5))
    # one at a time, backwards, in another batch: the same
    again = [int(Draws(3, 1, 7).words(index[i : i + 1], 5)[0]) for i in (999, 500, 0)]
    assert again == first[[999, 500, 0]].tolist()
    for other in (Draws(3, 1, 8), Draws(3, 2, 7), Draws(4, 1, 7), Draws(1, 3, 7)):
        assert not (other.words(index, 5) == first).any()
    assert not (Draws(3, 1, 7).words(index, 6) == first).any()


@pytest.mark.parametrize("axis", ["sample", "counter", "seed", "epoch"])
def test_neighbours_are_even_and_unrelated(axis):
    """Of consecutive coordinates: mean, variance, each bit, and correlation at small lags."""
    count = 1 << 16
    steps = np.arange(count)
    if axis in ("sample", "counter"):
        draws = Draws(1, 2)
        words = draws.words(steps, 3) if axis == "sample" else draws.words(np.full(count, 3), steps)
    else:
        few = range(4096)
        keys = [Draws(n, 2) if axis == "seed" else Draws(2, n) for n in few]
        words = np.concatenate([key.words(np.arange(16)) for key in keys])
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64)
    assert all(five_sigma(share, 0.5, 0.5, len(words)) for share in bits.mean(axis=0))
    uniform = (words >> np.uint64(11)) * 2.0**-53
    assert uniform.min() >= 0.0 and uniform.max() < 1.0
    assert five_sigma(uniform.mean(), 0.5, math.sqrt(1 / 12), len(words))
    centred = (uniform - 0.5) * math.sqrt(12)
    for lag in (1, 2, 3, 16, 256):
        assert five_sigma((centred[lag:] * centred[:-lag]).mean(), 0.0, 1.0, len(words) - lag)


def test_below_is_even():
    counts = np.bincount(Draws(0).below(7, np.arange(70_000)), minlength=7)
    # chi-squared of 6 degrees of freedom: mean 6, variance 12
    assert abs(((counts - 10_000) ** 2 / 10_000).sum() - 6) < 5 * math.sqrt(12)
    assert set(Draws(0).below(np.array([1, 2]), np.arange(2)).tolist()) <= {0, 1}


def test_binomial_is_that_of_fair_coins():
    trials = np.tile([0, 1, 63, 64, 65, 300], 4000)
    heads = Draws(5).binomial(trials, np.arange(len(trials)))
    assert (heads >= 0).all() and (heads <= trials).all()
    for count in (1, 63, 64, 65, 300):
        own = heads[trials == count]
        assert five_sigma(own.mean(), count / 2, math.sqrt(count) / 2, len(own))
        assert five_sigma(own.var(), count / 4, count / 4 * math.sqrt(2), len(own))
    assert len(Draws(5).binomial(np.zeros(0, np.int64), np.zeros(0, np.int64))) == 0


def test_permutations():
    orders = [Draws(seed).permutation(5).tolist() for seed in range(6000)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    counts = [orders.count(list(order)) for order in itertools.permutations(range(5))]
    chi = sum((count - 50) ** 2 / 50 for count in counts)
    assert abs(chi - 119) < 5 * math.sqrt(2 * 119)
