"""Correlation of two lists of numbers, in plain numpy."""

from __future__ import annotations

import numpy as np


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's r of [examples] and [examples]; 0 where one of them is constant.

    Raises:
        ValueError: other shapes, or no two examples.
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            "correlation: two lists of at least 2 numbers are needed, got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    one, two = (values.astype(np.float64) for values in (first, second))
    one, two = one - one.mean(), two - two.mean()
    size = np.sqrt((one @ one) * (two @ two))
    return float(one @ two / size) if size else 0.0


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rho: Pearson's r of the ranks, equal values sharing their mean rank."""
    return pearson(ranks(first), ranks(second))


def ranks(values: np.ndarray) -> np.ndarray:
    """[examples] float64 ranks from 1, the mean rank for equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[place]
