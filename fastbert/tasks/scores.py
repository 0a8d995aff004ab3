"""Scores of classification, in plain numpy."""

from __future__ import annotations

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers; both [examples] integers, at least one."""
    _check(predicted, labels)
    return float((predicted == labels).mean())


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN); every class counts alike.

    Args:
        predicted, labels: [examples] integers from 0, at least one. A class that occurs in
            neither has no F1 and is left out.
    """
    _check(predicted, labels)
    classes = int(max(predicted.max(), labels.max())) + 1
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    # 2 TP + FP + FN: how often the class was predicted, and how often it was right to
    total = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    present = total > 0
    return float((2 * hits[present] / total[present]).mean())


def majority(labels: np.ndarray) -> float:
    """Accuracy of always naming the class that is most frequent here."""
    _check(labels, labels)
    return float(np.bincount(labels).max() / len(labels))


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            "scores: predicted and labels must both be [examples], at least one, got "
            f"{list(predicted.shape)} and {list(labels.shape)}"
        )
