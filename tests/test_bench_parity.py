"""The bench's error rule: what it lets through and what it stops."""

from __future__ import annotations

import math

import pytest
import torch

from fastbert.bench.parity import Parity

EPS = torch.finfo(torch.float32).eps


def judged(ours: float, theirs: float, truth: float = 0.0) -> list[str]:
    parity = Parity(torch.float32)
    parity.add(
        *({"x": torch.tensor([v], dtype=torch.float64)} for v in (truth + ours, truth + theirs)),
        {"x": torch.tensor([truth], dtype=torch.float64)},
    )
    return parity.failures()


def test_as_wrong_as_the_peer_is_right_enough():
    assert judged(1.0, 1.0) == []


def test_much_wronger_than_the_peer_is_not():
    (line,) = judged(1.5, 1.0)
    assert line.startswith("x: rms error 1.50e+00")
    assert len(judged(2.5, 1.0)) == 2


def test_rounding_of_the_result_is_allowed_where_the_peer_is_exact():
    assert judged(EPS, 0.0, truth=1.0) == []
    assert judged(3 * EPS, 0.0, truth=1.0) != []


def test_nan_fails():
    assert len(judged(math.nan, 1.0)) == 2


def test_batches_are_pooled():
    parity = Parity(torch.float32)
    for ours, theirs in ((2.0, 0.0), (0.0, 2.0)):
        parity.add(
            *({"x": torch.tensor([v], dtype=torch.float64)} for v in (ours, theirs)),
            {"x": torch.zeros(1, dtype=torch.float64)},
        )
    assert parity.failures() == []
    assert parity.beside_peer() == [1.0]
    assert parity.worst() == 0.8


def test_names_and_shapes_must_agree():
    parity = Parity(torch.float32)
    truth = {"x": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="name different tensors"):
        parity.add({"y": torch.zeros(2)}, {"x": torch.zeros(2)}, truth)
    with pytest.raises(ValueError, match="x: the oracle must be fp64 and of the same shape"):
        parity.add({"x": torch.zeros(1)}, {"x": torch.zeros(2)}, truth)
