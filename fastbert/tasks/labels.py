"""Sets of class names, learnt from training rows and held against others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fastbert.errors import InputError

# more labels than this, and hardly one twice: the column is no class
MOST_RARE_LABELS = 20


def label_set(values: Sequence[str], where: str = "training rows", remedy: str = "") -> list[str]:
    """The classes of a training set; numbers in the order of their values, else sorted.

    Args:
        values: one label a row.
        where: in front of an error message.
        remedy: what to do where nearly every row has a label of its own.

    Raises:
        InputError: fewer than two classes, or nearly as many as rows.
    """
    labels = Counter(values)
    if len(labels) < 2:
        raise InputError(
            f"{where}: at least 2 different labels are needed, found {len(labels)} "
            f"({', '.join(labels)})"
        )
    if len(labels) > max(MOST_RARE_LABELS, len(values) / 2):
        raise InputError(
            f"{where}: {len(labels):,} different labels in {len(values):,} rows are no classes"
            f"{remedy}"
        )
    return ordered(labels)


def ordered(labels: Iterable[str]) -> list[str]:
    """Numbers in the order of their values, else sorted."""
    labels = list(labels)
    numbers = [_number(label) for label in labels]
    if None in numbers:
        return sorted(labels)
    return [label for _, label in sorted(zip(numbers, labels, strict=True))]


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_labels(
    found: Iterable[tuple[int, str]], labels: Sequence[str], where: str = "evaluation rows"
) -> None:
    """Refuse a class that is not in the label set.

    Args:
        found: lines, 0 where there is none, with their labels.
        labels: the label set.
        where: in front of an error message.

    Raises:
        InputError: naming the class and its line.
    """
    known = set(labels)
    for number, label in found:
        if label not in known:
            line = f":{number}" if number else ""
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise InputError(
                f"{where}{line}: the class {label!r} is not among those of the training file "
                f"({shown})"
            )


def indices(values: Iterable[str], labels: Sequence[str]) -> np.ndarray:
    """Places in the label set, int64."""
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[value] for value in values], dtype=np.int64)
