from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import DEVICE, DTYPES, by, few_examples, normal, runs_kernels
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import launch, ops
from fastbert.kernels.checks import ACTIVATIONS

pytestmark = runs_kernels


def inputs(rows: int, hidden: int, intermediate: int, *, gated: bool = False, biases: bool = True):
    wide = 2 * intermediate if gated else intermediate

    def make(generator: torch.Generator) -> dict[str, Tensor]:
        made = {
            "x": normal(generator, rows, hidden),
            "w1": normal(generator, wide, hidden) * hidden**-0.5,
            "w2": normal(generator, hidden, intermediate) * intermediate**-0.5,
        }
        if biases:
            made |= {"b1": normal(generator, wide), "b2": normal(generator, hidden)}
        return made

    return make


def check(make, dtype, operator=ops.feed_forward, **constants):
    with poison():
        check_operator(
            by("triton", operator, **constants),
            by("reference", operator, **constants),
            make,
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_by_the_error_rule(activation, dtype):
    check(inputs(21, 40, 72), dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_by_the_error_rule(activation, biases, dtype):
    make = inputs(13, 40, 72, gated=True, biases=biases)
    check(make, dtype, ops.gated_feed_forward, activation=activation)


def test_without_the_second_bias():
    def make(generator):
        made = inputs(5, 40, 72)(generator)
        del made["b2"]
        return made

    check(make, torch.float32)


@few_examples
@given(
    rows=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65]),
    hidden=st.integers(1, 50),
    intermediate=st.integers(1, 300),
)
def test_any_shape(rows, hidden, intermediate):
    check(inputs(rows, hidden, intermediate), torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_whole_range_of_values(activation):
    def make(generator):
        x = torch.linspace(-60, 60, 481, dtype=torch.float64)[:, None]
        one = torch.ones(1, 1, dtype=torch.float64)
        return {"x": x, "w1": one, "b1": torch.zeros(1, dtype=torch.float64), "w2": one}

    check(make, torch.float32, activation=activation)


def test_no_rows_are_a_valid_no_op():
    check(inputs(0, 40, 72), torch.float32)


def test_a_repeat_is_the_same_bit_for_bit():
    results = []
    for _ in range(2):
        made = inputs(33, 40, 72)(torch.Generator().manual_seed(0))
        made = {name: t.float().to(DEVICE).requires_grad_() for name, t in made.items()}
        with ops.use_backend("triton"):
            y = ops.feed_forward(**made)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in made.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_keeps_only_the_input_and_one_pre_activation():
    kept = []
    made = inputs(16, 40, 160)(torch.Generator().manual_seed(0))
    made = {name: t.float().to(DEVICE).requires_grad_() for name, t in made.items()}

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with ops.use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.feed_forward(**made)
    activations = [shape for shape in kept if shape[0] == 16]
    assert sorted(activations) == [(16, 40), (16, 160)]


@pytest.fixture
def fused(monkeypatch):
    """Choose the second implementation, as a measured row of the launch table would."""
    small = launch.Launch(rows=16, columns=16, inner=16, num_warps=4, programs_per_processor=1)
    measured = launch.measured
    monkeypatch.setattr(
        launch,
        "measured",
        lambda kernel, *rest: small if kernel == "linear_activation" else measured(kernel, *rest),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fused_product_by_the_error_rule(activation, dtype, fused):
    check(inputs(70, 40, 100), dtype, activation=activation)


def test_the_fused_product_walks_every_tile(fused):
    # more rows of tiles than a group holds, and a group that is not full
    check(inputs(16 * 9 + 3, 17, 70), torch.float32)
