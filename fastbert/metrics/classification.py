"""Scores of classification, in plain numpy: one class an example, or any number of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassScore:
    """One row of a per-class table.

    Attributes:
        name: of the class.
        precision, recall, f1: shares; 0 where nothing was predicted or nothing was there.
        support: examples of the class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


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


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """[classes, classes] counts; a row a true class, a column a predicted one."""
    _check(predicted, labels)
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004, R_K); 0 where undefined."""
    _check(predicted, labels)
    classes = int(max(predicted.max(), labels.max())) + 1
    of_predicted = np.bincount(predicted, minlength=classes).astype(np.float64)
    of_labels = np.bincount(labels, minlength=classes).astype(np.float64)
    examples = float(len(labels))
    covariance = float((predicted == labels).sum()) * examples - of_predicted @ of_labels
    spread = (examples**2 - of_predicted @ of_predicted) * (examples**2 - of_labels @ of_labels)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def per_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[ClassScore]:
    """Precision, recall and F1 of every class, in the order of their names."""
    table = confusion_matrix(predicted, labels, len(names))
    hits = np.diag(table)
    return _rows(hits, table.sum(axis=0), table.sum(axis=1), names)


def per_label(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[ClassScore]:
    """As `per_class`, where an example may have any number of labels; [examples, labels] bool."""
    _check_many(predicted, labels)
    hits = (predicted & labels).sum(axis=0)
    return _rows(hits, predicted.sum(axis=0), labels.sum(axis=0), names)


def multi_label_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of label sets.

    Args:
        predicted, labels: [examples, labels] bool, at least one example.

    Returns:
        exact: share of examples whose whole set is right; micro_f1 over all decisions; macro_f1
        over labels, where one that is neither there nor predicted has no F1 and is left out.
    """
    _check_many(predicted, labels)
    hits = (predicted & labels).sum(axis=0)
    total = predicted.sum(axis=0) + labels.sum(axis=0)
    present = total > 0
    by_label = 2 * hits[present] / total[present]
    return {
        "exact": float((predicted == labels).all(axis=1).mean()),
        "micro_f1": float(2 * hits.sum() / total.sum()) if total.sum() else 0.0,
        "macro_f1": float(by_label.mean()) if len(by_label) else 0.0,
    }


def f1(hits: float, predicted: float, there: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of counts; 0 where nothing was predicted or nothing was there."""
    precision = hits / predicted if predicted else 0.0
    recall = hits / there if there else 0.0
    harmonic = 2 * hits / (predicted + there) if predicted + there else 0.0
    return precision, recall, harmonic


def _rows(
    hits: np.ndarray, predicted: np.ndarray, there: np.ndarray, names: Sequence[str]
) -> list[ClassScore]:
    return [
        ClassScore(name, *f1(float(hit), float(said), float(true)), int(true))
        for name, hit, said, true in zip(names, hits, predicted, there, strict=True)
    ]


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            "scores: predicted and labels must both be [examples], at least one, got "
            f"{list(predicted.shape)} and {list(labels.shape)}"
        )


def _check_many(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or labels.ndim != 2 or not len(labels):
        raise ValueError(
            "scores: predicted and labels must both be [examples, labels], at least one example, "
            f"got {list(predicted.shape)} and {list(labels.shape)}"
        )
