from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import SEEDS, ErrorRule, check_operator, poison, rounded, run_operator
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear_inputs(generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(7, 33, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 33, generator=generator, dtype=torch.float64)
    return {"x": x, "weight": weight}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def linear_another_way(x: Tensor, weight: Tensor) -> Tensor:
    return (weight @ x.t()).t()


class WrongWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, 1.03 * gradient.t() @ x


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_operator_passes(dtype):
    check_operator(linear_another_way, linear, linear_inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_output_fails(dtype):
    with pytest.raises(AssertionError, match=r"output\[0\]: rms error"):
        check_operator(lambda x, weight: 1.03 * linear(x, weight), linear, linear_inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_gradient_fails(dtype):
    with pytest.raises(AssertionError, match="grad weight: rms error") as failure:
        check_operator(WrongWeightGradient.apply_by_name, linear, linear_inputs, dtype)
    assert "output" not in str(failure.value)
    assert "grad x" not in str(failure.value)


def apply_by_name(x: Tensor, weight: Tensor) -> Tensor:
    return WrongWeightGradient.apply(x, weight)


WrongWeightGradient.apply_by_name = staticmethod(apply_by_name)


def test_one_element_out_of_many_fails_by_its_maximum():
    def nearly(x, weight):
        output = linear(x, weight).clone()
        output[0, 0] = output[0, 0] + 2e-5
        return output

    with pytest.raises(AssertionError, match="max error"):
        check_operator(nearly, linear, linear_inputs, torch.float32)


def test_a_coarser_computation_fails():
    def through_bfloat16(x, weight):
        return linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)

    with pytest.raises(AssertionError, match="times the"):
        check_operator(through_bfloat16, linear, linear_inputs, torch.float32)


def test_a_coarser_output_brings_no_licence():
    with pytest.raises(AssertionError, match="output"):
        check_operator(
            lambda x, weight: linear(x, weight).bfloat16(), linear, linear_inputs, torch.float32
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_fail(value):
    def spoiled(x, weight):
        output = linear(x, weight).clone()
        output[3, 2] = value
        return output

    with pytest.raises(AssertionError, match="output"):
        check_operator(spoiled, linear, linear_inputs, torch.float32)


def test_a_gradient_that_never_arrives_fails():
    with pytest.raises(AssertionError, match="no gradient reached weight"):
        check_operator(
            lambda x, weight: linear(x, weight.detach()), linear, linear_inputs, torch.float32
        )


def test_infinities_must_agree():
    rule = ErrorRule()
    oracle = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    rule.compare("lse", oracle.float(), oracle.float(), oracle)
    with pytest.raises(AssertionError, match="infinities differ"):
        rule.compare("lse", torch.tensor([1.0, -1e30]), oracle.float(), oracle)


def test_the_rule_wants_its_seeds():
    rule = ErrorRule()
    with pytest.raises(AssertionError, match="nothing was compared"):
        rule.assert_within()
    one = torch.ones(3)
    for _ in SEEDS[1:]:
        rule.compare("output", one, one, one.double())
    with pytest.raises(AssertionError, match="4 comparisons"):
        rule.assert_within()
    rule.compare("output", one, one, one.double())
    rule.assert_within()


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shapes differ"):
        ErrorRule().compare("output", torch.ones(3), torch.ones(3), torch.ones(1).double())


def test_seeds_are_pooled():
    # one seed alone is over the bound, the five together are not
    rule = ErrorRule()
    oracle = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    for seed in SEEDS:
        ours = oracle.float() + (5 * eps if seed == 0 else 0)
        rule.compare("output", ours, oracle.float() + 2 * eps, oracle)
    rule.assert_within()
    alone = ErrorRule()
    alone.compare("output", oracle.float() + 5 * eps, oracle.float() + 2 * eps, oracle)
    with pytest.raises(AssertionError, match="rms"):
        alone.assert_within(seeds=1)


def test_empty_tensors_pass():
    def empty_inputs(generator):
        return {name: t[:0] if name == "x" else t for name, t in linear_inputs(generator).items()}

    check_operator(linear_another_way, linear, empty_inputs, torch.float32)


def test_the_oracle_sees_the_rounded_values():
    inputs = rounded(linear_inputs(torch.Generator().manual_seed(0)), torch.bfloat16)
    assert inputs["x"].dtype == torch.float64
    assert torch.equal(inputs["x"], inputs["x"].bfloat16().double())


def test_constants_get_no_gradient():
    inputs = linear_inputs(torch.Generator().manual_seed(0))
    results = run_operator(linear, inputs, torch.float32, 0, constants=["x"])
    assert results.keys() == {"output[0]", "grad weight"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_fills_fresh_memory(dtype):
    like = torch.ones(3, dtype=dtype)
    with poison():
        fresh = [torch.empty(2, 3, dtype=dtype), torch.empty_like(like), like.new_empty((4, 1))]
        integers = torch.empty(5, dtype=torch.int64)
    assert [tuple(t.shape) for t in fresh] == [(2, 3), (3,), (4, 1)]
    assert all(t.isnan().all() and t.dtype == dtype and t.is_contiguous() for t in fresh)
    assert integers.shape == (5,)


def test_poison_is_lifted_after_an_error():
    before = torch.empty, torch.empty_like, Tensor.new_empty
    with pytest.raises(KeyError), poison():
        raise KeyError
    assert before == (torch.empty, torch.empty_like, Tensor.new_empty)


@pytest.mark.parametrize("offset, where", [(-1, "before the start"), (6, "past the end")])
def test_writing_outside_a_buffer_is_caught(offset, where):
    with pytest.raises(AssertionError, match=where), poison():
        buffer = torch.empty(2, 3)
        buffer.as_strided((1,), (1,), buffer.storage_offset() + offset).fill_(0)


def test_poisoned_memory_trains():
    with poison():
        x = torch.ones(4, requires_grad=True)
        output = torch.empty(4)
        output.copy_(2 * x)
        output.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((4,), 2.0))
