"""A query's passages in lists: a relevant one, and irrelevant ones that it is to be told from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastbert.tasks.table import Row


class Candidates(NamedTuple):
    """What one softmax runs over.

    Attributes:
        rows: the relevant passage, then the others.
        numbers: of each row in its file.
    """

    rows: tuple[Row, ...]
    numbers: tuple[int, ...]


def deal_candidates(
    rows: Sequence[Row], gains: Sequence[float], negatives: int
) -> list[Candidates]:
    """A list for every relevant passage of a query that has irrelevant ones too.

    The irrelevant ones go round: none of a query's comes twice before each came once.

    Args:
        rows: of a file, a query's anywhere in it.
        gains: of each row; more than 0 is relevant.
        negatives: irrelevant passages a list at most.
    """
    relevant: dict[str, list[int]] = {}
    others: dict[str, list[int]] = {}
    for number, (row, gain) in enumerate(zip(rows, gains, strict=True)):
        (relevant if gain > 0 else others).setdefault(row.text, []).append(number)
    lists = []
    for query, own in relevant.items():
        if query not in others:
            continue
        # files often have the hardest ones first; a resumed run must draw the same
        around = np.random.default_rng(own).permutation(others[query])
        size = min(negatives, len(around))
        for place, number in enumerate(own):
            taken = around[(place * size + np.arange(size)) % len(around)]
            numbers = (number, *taken.tolist())
            lists.append(Candidates(tuple(rows[n] for n in numbers), numbers))
    return lists
