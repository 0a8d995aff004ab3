"""Packing: how full batches are, and what finding the places costs, over distributions of lengths.

Best fit beside first-come packing, where a batch is closed when the next sequence does not fit; how
much of padded batches is padding, in the order of the text and sorted by length, is noted beside.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastbert.bench.distributions import NAMED, lengths_of, padding_share
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.timing import Step
from fastbert.packing import best_fit

SEQUENCES, QUICK_SEQUENCES = 20_000, 4_000
PADDED_BATCH = 32
DTYPE = "int64"
Deal = Callable[[np.ndarray, int], list[list[int]]]


def first_come(lengths: np.ndarray, budget: int) -> list[list[int]]:
    """Sequences in their order, a new batch whenever the next does not fit."""
    batches: list[list[int]] = [[]]
    used = 0
    for number, length in enumerate(lengths.tolist()):
        if used + length > budget and batches[-1]:
            batches.append([])
            used = 0
        batches[-1].append(number)
        used += length
    return batches


def fullness(lengths: np.ndarray, batches: list[list[int]], budget: int) -> float:
    """Real tokens over the room of all batches but the last, which ends where the text does."""
    kept = batches[:-1] or batches
    return sum(int(lengths[part].sum()) for part in kept) / (budget * len(kept))


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One case a distribution."""
    sequences = QUICK_SEQUENCES if options.quick else SEQUENCES
    for name in [options.lengths] if options.lengths else NAMED:
        lengths = lengths_of(name, sequences)
        yield _case(name, lengths, max(options.token_budget, int(lengths.max())))


def _case(name: str, lengths: np.ndarray, budget: int) -> Case:
    dealers = {OURS: best_fit, "first come": first_come}
    found = []
    for provider, deal in dealers.items():
        step = functools.partial(deal, lengths, budget)
        figures = functools.partial(_full, deal, lengths, budget)
        make = functools.partial(_same, step)
        found.append(Provider(provider, DTYPE, make, figures=figures, in_torch=False))
    share, ordered = (
        padding_share(lengths, PADDED_BATCH, ordered=ordered) for ordered in (False, True)
    )
    real = int(lengths.sum())
    conditions = {
        "lengths": name,
        "sequences": len(lengths),
        "token_budget": budget,
        "padded_batch": PADDED_BATCH,
        "padding_share": round(share, 4),
        "padding_share_sorted": round(ordered, 4),
    }
    note = (
        f"padded batches of {PADDED_BATCH}: {share:.1%} padding in the order of the text, "
        f"{ordered:.1%} sorted by length"
    )
    title = f"{len(lengths):,} x {name}, budget {budget:,}"
    return Case("packing", title, Work(real, round(real / (1 - share))), found, conditions, [note])


def _full(deal: Deal, lengths: np.ndarray, budget: int) -> dict[str, float]:
    return {"full %": round(100 * fullness(lengths, deal(lengths, budget), budget), 3)}


def _same(step: Step) -> Step:
    """Nothing is to be loaded."""
    return step


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", help=f"{', '.join(NAMED)}, a number, or a text file (all)")
    parser.add_argument("--token-budget", type=positive, default=16384, help="(%(default)s)")


SUITE = Suite("packing", __doc__, cases, repeats=5, warm_up=1, add_flags=_add_flags)
main = SUITE.main
