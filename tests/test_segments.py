"""Sums over neighbouring rows: by both ways the same, and nothing of what is past the end."""

from __future__ import annotations

import types

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import tiny_examples

from fastbert.model import mean_of_tokens
from fastbert.packing import Capacity
from fastbert.segments import owners, segment_sum


class OnAGpu(torch.Tensor):
    """Says that it is on a GPU, and computes on the CPU."""

    is_cuda = True


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpus_way_is_a_cpus_to_the_bit(dtype, shape, monkeypatch):
    bounds = torch.tensor([0, 4, 4, 5, 23, 40], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((47, *shape), generator=generator, dtype=dtype)
    values[40:] = float("nan")
    found = []
    for kind in (torch.Tensor, OnAGpu):
        own = values.clone().requires_grad_()
        sums = segment_sum(own.as_subclass(kind), bounds, owners(bounds, 47))
        (sums * torch.arange(1, 6).reshape(5, *[1] * len(shape))).sum().backward()
        found.append((sums.detach().as_subclass(torch.Tensor), own.grad))
    for cpu, gpu in zip(*found, strict=True):
        assert torch.equal(cpu, gpu)
    sums, slopes = found[0]
    assert sums[1].eq(0).all() and sums.isfinite().all()
    assert torch.equal(sums[0], values[0] + values[1] + values[2] + values[3])
    assert slopes[40:].eq(0).all() and slopes[5:23].eq(4).all()


def test_on_a_gpu_nothing_is_added_by_index(monkeypatch):
    """Such sums would differ from run to run."""
    taken = []
    monkeypatch.setattr(torch, "segment_reduce", lambda *given, **_: taken.append(given[1]))
    segment_sum(types.SimpleNamespace(is_cuda=True), torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert taken == ["sum"]


def test_owners_are_numbered_and_the_tail_is_of_none():
    found = owners(torch.tensor([0, 2, 2, 3]), 6)
    assert found.tolist() == [0, 0, 2, 3, 3, 3]


def test_a_mean_of_bf16_states_is_as_exact_as_one_in_fp32():
    """Summed in bf16, some hundred tokens stop growing."""
    batch = tiny_examples([300, 1, 40]).batch(range(3), Capacity(360, 4, 8))
    rule = ErrorRule()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        states = (torch.randn(360, 7, generator=generator) + 1.0).bfloat16()
        states[341:] = float("nan")
        wanted = [states[:300], states[300:301], states[301:341], torch.zeros(1, 7).bfloat16()]
        means = [
            torch.stack([part.to(dtype).mean(dim=0) for part in wanted])
            for dtype in (torch.float32, torch.float64)
        ]
        rule.compare("mean", mean_of_tokens(states, batch), *means)
    rule.assert_within()
