"""Every head on a GPU: its numbers those of a CPU in fp64, its steps waited for by nobody."""

from __future__ import annotations

import copy

import pytest
import torch
from device_cases import GPU, HEADS, trained
from kernel_harness import never_waiting
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred

from fastbert.kernels import launch, ops
from fastbert.kernels.ops import Rng
from fastbert.training.step import Inputs, backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter is no GPU"),
]

CPU = torch.device("cpu")
# two dtypes draw other tokens
DRAWN = "generator and discriminator"


@pytest.mark.parametrize("head", [name for name in HEADS if name != DRAWN])
def test_losses_and_gradients(head):
    make, batch_of = HEADS[head]
    rule = ErrorRule()
    for seed in SEEDS:
        batch = batch_of(seed)
        results = []
        for device, backend, dtype in (
            (GPU, "triton", torch.float32),
            (GPU, "reference", torch.float32),
            (CPU, "reference", torch.float64),
        ):
            model = stirred(make(), seed).to(device, dtype)
            inputs = Inputs.send([copy.deepcopy(batch)], None, device)
            with ops.use_backend(backend):
                sums = backward(model, inputs, torch.float32)
            losses = {name: value for name, value in sums.items() if name.endswith("loss")}
            results.append(losses | gradients(model))
        for name in results[0]:
            rule.compare(name, *(result[name] for result in results))
    rule.assert_within()


@pytest.mark.parametrize("head", HEADS)
def test_a_step_waits_for_nothing(head):
    make, batch_of = HEADS[head]
    step = trained(make())
    for number in range(2):
        # kernels are compiled and the optimiser's state is made
        step([batch_of(0), batch_of(1)], Rng(3, number), 1.0)
    with never_waiting():
        result = step([batch_of(2), batch_of(3)], Rng(3, 2), 1.0)
    assert result.sums["gradient_norm"].isfinite()
