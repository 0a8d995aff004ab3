from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import DEVICE, DTYPES, by, few_examples, normal, runs_kernels
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import launch, ops
from fastbert.kernels.philox import Rng, exact_mask

pytestmark = runs_kernels

RNG = Rng(seed=5, step=2, layer=3, site=1, exact=True)
VARIANTS = {
    "bare": ("x", "weight", "bias"),
    "bias": ("x", "weight", "bias", "x_bias"),
    "residual": ("x", "weight", "bias", "residual"),
    "whole": ("x", "weight", "bias", "x_bias", "residual"),
}


def inputs(rows: int, width: int, variant: str = "whole"):
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        everything = {
            "x": normal(generator, rows, width),
            "weight": 1 + normal(generator, width) / 8,
            "bias": normal(generator, width),
            "x_bias": normal(generator, width),
            "residual": normal(generator, rows, width),
        }
        return {name: everything[name] for name in VARIANTS[variant]}

    return make


def check(rows, width, variant, dtype, dropout_p=0.0, operator=ops.layer_norm):
    constants = {"dropout_p": dropout_p, "rng": RNG}
    with poison():
        check_operator(
            by("triton", operator, **constants),
            by("reference", operator, **constants),
            inputs(rows, width, variant),
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, dropout_p):
    check(5, 96, variant, torch.float32, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_dtype(dropout_p, dtype):
    check(5, 96, "whole", dtype, dropout_p)


@pytest.mark.parametrize("width", [32, 33, 128, 384, 768, 1000, 1024, 4097, 8192])
def test_widths(width):
    check(2, width, "whole", torch.float32, 0.1)


@few_examples
@given(rows=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65]), width=st.integers(32, 160))
def test_any_shape(rows, width):
    check(rows, width, "whole", torch.float32, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_with_the_sum_as_second_output(dropout_p, dtype):
    check(9, 100, "whole", dtype, dropout_p, ops.layer_norm_with_sum)


def test_values_far_from_zero_keep_their_variance():
    def far(generator):
        return {**inputs(4, 768)(generator), "x": 1e4 + normal(generator, 4, 768)}

    check_operator(
        by("triton", ops.layer_norm),
        by("reference", ops.layer_norm),
        far,
        torch.float32,
        device=DEVICE,
    )


def test_strided_rows():
    generator = torch.Generator().manual_seed(0)
    wide = normal(generator, 6, 3, 128).float().to(DEVICE)
    weight, bias = torch.ones(128, device=DEVICE), torch.zeros(128, device=DEVICE)
    with ops.use_backend("triton"):
        strided = ops.layer_norm(wide[:, 1], weight, bias, residual=wide[:, 2])
        whole = ops.layer_norm(
            wide[:, 1].contiguous(), weight, bias, residual=wide[:, 2].contiguous()
        )
    assert torch.equal(strided, whole)


def test_a_gradient_without_rows_in_memory():
    x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    weight, bias = torch.rand(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    results = []
    for flow in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        x.grad = None
        with ops.use_backend("triton"):
            flow(ops.layer_norm(x, weight, bias)).backward()
        results.append(x.grad)
    assert torch.equal(*results)


def run(seed: int, rng: Rng) -> list[Tensor]:
    made = inputs(37, 96)(torch.Generator().manual_seed(seed))
    made = {name: t.float().to(DEVICE).requires_grad_() for name, t in made.items()}
    with ops.use_backend("triton"):
        y = ops.layer_norm(**made, dropout_p=0.3, rng=rng)
    y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y))
    return [y, *(t.grad for t in made.values())]


def test_a_repeat_is_the_same_bit_for_bit():
    assert all(torch.equal(a, b) for a, b in zip(run(0, RNG), run(0, RNG), strict=True))


def test_other_draws_differ():
    first = run(0, RNG)[0]
    for other in (RNG.at(3, 2), RNG.at(4, 1), Rng(5, 3, 0, 3, 1)):
        assert not torch.equal(first, run(0, other)[0])


def test_dropped_elements_are_those_of_the_twin():
    x = torch.ones(6, 64, device=DEVICE)
    with ops.use_backend("triton"):
        _, total = ops.layer_norm_with_sum(
            x, torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE), dropout_p=0.4, rng=RNG
        )
    assert torch.equal(total.cpu(), exact_mask((6, 64), 0.4, RNG))


def test_no_rows_are_a_valid_no_op():
    check(0, 64, "whole", torch.float32, 0.1)


def test_parameters_may_be_wider_than_activations():
    made = inputs(3, 64)(torch.Generator().manual_seed(0))
    x, residual = (made[name].bfloat16().to(DEVICE).requires_grad_() for name in ("x", "residual"))
    weight, bias = (made[name].float().to(DEVICE).requires_grad_() for name in ("weight", "bias"))
    with ops.use_backend("triton"):
        y = ops.layer_norm(x, weight, bias, residual=residual)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == residual.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("width", [32, 768, 1000, 1024, 5120, 8192])
def test_tiles_cover_a_row_with_little_waste(width):
    columns = launch.chunk_columns(width)
    covered = -(-width // columns) * columns
    assert width <= covered and covered <= 8 * columns
    assert covered == width or width == 1000
