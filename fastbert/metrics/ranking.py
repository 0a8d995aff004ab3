"""Scores of ranked lists: recall, mean reciprocal rank, discounted gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def recall_at(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Share of the relevant documents (gain above 0) among the first k; 0 where there are none."""
    relevant = {name for name, gain in gains.items() if gain > 0}
    return len(relevant & set(ranked[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """1 / rank of the first relevant document among the first k, else 0."""
    ranks = (rank for rank, name in enumerate(ranked[:k], 1) if gains.get(name, 0) > 0)
    return 1 / next(ranks, math.inf)


def ndcg_at(ranked: Sequence[str], gains: Mapping[str, float], k: int) -> float:
    """Discounted gain (gain / log2(rank + 1), Jarvelin and Kekalainen 2002) over the best there is.

    The gain is taken as it is, as trec_eval's ndcg_cut does, not as 2 ** gain - 1.
    """
    ideal = _discounted(sorted((gain for gain in gains.values() if gain > 0), reverse=True), k)
    found = _discounted([max(gains.get(name, 0.0), 0.0) for name in ranked], k)
    return found / ideal if ideal else 0.0


def _discounted(gains: Sequence[float], k: int) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], 1))


def ranking_scores(
    ranked: Mapping[str, Sequence[str]], gains: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Means over the queries that have a relevant document.

    Args:
        ranked: document names of each query, the best first.
        gains: of each query's judged documents; those that are not judged have gain 0.

    Returns:
        ndcg_at_10, mrr_at_10, recall_at_1, recall_at_10, recall_at_100.

    Raises:
        ValueError: no query has a relevant document.
    """
    queries = [name for name in ranked if any(gain > 0 for gain in gains.get(name, {}).values())]
    if not queries:
        raise ValueError("ranking: no query has a relevant document")
    measures: dict[str, list[float]] = {}
    for query in queries:
        found, own = ranked[query], gains[query]
        measures.setdefault("ndcg_at_10", []).append(ndcg_at(found, own, 10))
        measures.setdefault("mrr_at_10", []).append(reciprocal_rank(found, own, 10))
        for k in (1, 10, 100):
            measures.setdefault(f"recall_at_{k}", []).append(recall_at(found, own, k))
    return {name: float(np.mean(values)) for name, values in measures.items()}
