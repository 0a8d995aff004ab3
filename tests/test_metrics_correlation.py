from __future__ import annotations

import numpy as np
import pytest

from fastbert.metrics.correlation import pearson, ranks, spearman


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_against_scipy(seed, ties) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is in the test extra")
    rng = np.random.default_rng(seed)
    first = rng.normal(size=83)
    second = first + rng.normal(size=83)
    if ties:
        first, second = first.round(), second.round()
    eps = 64 * np.finfo(np.float64).eps
    assert abs(pearson(first, second) - stats.pearsonr(first, second).statistic) <= eps
    assert abs(spearman(first, second) - stats.spearmanr(first, second).statistic) <= eps
    assert (ranks(first) == stats.rankdata(first)).all()


def test_order_is_all_that_ranks_see() -> None:
    values = np.array([3.0, 1.0, 2.0, 10.0])
    assert spearman(values, np.exp(values)) == 1.0 > pearson(values, np.exp(values))
    assert spearman(values, -values) == -1.0


def test_a_constant_has_no_correlation() -> None:
    assert pearson(np.ones(3), np.arange(3.0)) == 0.0


@pytest.mark.parametrize(("first", "second"), [((1.0,), (1.0,)), ((1.0, 2.0), (1.0, 2.0, 3.0))])
def test_too_few_or_unequal(first, second) -> None:
    with pytest.raises(ValueError, match="at least 2 numbers"):
        pearson(np.array(first), np.array(second))
