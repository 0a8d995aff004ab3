from __future__ import annotations

import math

import numpy as np
import pytest

from fastbert.metrics.ranking import ndcg_at, ranking_scores, recall_at, reciprocal_rank

GAINS = {"a": 3.0, "b": 1.0, "c": 0.0, "d": -1.0}


def test_a_case_worked_out_by_hand() -> None:
    ranked = ["c", "b", "x", "a"]
    assert recall_at(ranked, GAINS, 2) == 0.5 and recall_at(ranked, GAINS, 4) == 1.0
    assert reciprocal_rank(ranked, GAINS, 10) == 0.5 and reciprocal_rank(ranked, GAINS, 1) == 0.0
    ideal = 3 + 1 / math.log2(3)
    assert ndcg_at(ranked, GAINS, 10) == (1 / math.log2(3) + 3 / math.log2(5)) / ideal
    assert ndcg_at(["a", "b"], GAINS, 10) == 1.0 and ndcg_at(["d", "c"], GAINS, 10) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_against_scikit_learn(seed) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the test extra")
    rng = np.random.default_rng(seed)
    gains, scores = rng.integers(0, 4, 30).astype(float), rng.normal(size=30)
    ranked = [str(number) for number in np.argsort(-scores)]
    ours = ndcg_at(ranked, {str(n): g for n, g in enumerate(gains)}, 10)
    theirs = metrics.ndcg_score(gains[None], scores[None], k=10)
    assert abs(ours - theirs) <= 64 * np.finfo(np.float64).eps


def test_queries_without_a_relevant_document_are_left_out() -> None:
    figures = ranking_scores(
        {"q1": ["a", "b"], "q2": ["a"], "q3": ["b", "a"]}, {"q1": {"a": 1}, "q3": {"a": 2}}
    )
    assert figures["mrr_at_10"] == 0.75 and figures["recall_at_1"] == 0.5
    assert figures["recall_at_10"] == figures["recall_at_100"] == 1.0
    with pytest.raises(ValueError, match="no query"):
        ranking_scores({"q": ["a"]}, {"q": {"a": 0}})
