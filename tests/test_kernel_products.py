"""Linear layers' products: the error rule, the same gradients, and who is left to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import SEEDS, ErrorRule
from torch import nn
from torch.autograd import forward_ad

from fastbert.kernels import ops, products

DTYPES = (torch.float32, torch.bfloat16)
needs_bf16 = pytest.mark.skipif(
    not products.has_bf16_products(), reason="this processor or this torch has no bf16 in oneDNN"
)
OF_ONEDNN = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]
# rows, in, out: one chain and several, more rows than one chain takes, one row, wide and narrow
SHAPES = ((40, 96, 64), (300, 64, 130), (5, 3000, 24), (1, 33, 7), (700, 20, 512))


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch):
    """On processors of any maker."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "has_slow_fp32", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that oneDNN is given."""
    found: list[torch.Tensor] = []
    real = products._onednn

    def recorded(x, weight, *rest):
        found.append(weight)
        return real(x, weight, *rest)

    monkeypatch.setattr(products, "_onednn", recorded)
    return found


def parts(shape: tuple[int, int, int], seed: int) -> list[torch.Tensor]:
    rows, width, out = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, width), (out, width), (out,), (rows, out))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def outcome(linear, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    x, weight, bias, flowing = (t.to(dtype) for t in tensors)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    output = linear(*inputs)
    output.backward(flowing)
    return [output.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", OF_ONEDNN, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, calls):
    rule = ErrorRule()
    for seed in SEEDS:
        # what both sides round to their dtype is no error of the product
        tensors = [t.to(dtype).double() for t in parts(shape, seed)]
        ours, torchs = (outcome(f, tensors, dtype) for f in (ops.linear, F.linear))
        oracle = outcome(F.linear, tensors, torch.float64)
        for name, *values in zip(
            ("y", "dx", "dweight", "dbias"), ours, torchs, oracle, strict=True
        ):
            rule.compare(name, *values)
    rule.assert_within()
    assert calls


@pytest.mark.parametrize("dtype", OF_ONEDNN, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("width", [48, 2100])
def test_gelu_on_the_way_out(dtype, activation, width, calls):
    rule = ErrorRule()
    approximate = products.GELU[activation]
    for seed in SEEDS:
        x, weight, bias, _ = parts((30, width, 50), seed)
        weight = weight / width**0.5
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        ours = products.linear_gelu(x, weight, bias, activation)
        assert ours.dtype == dtype
        torchs = F.gelu(F.linear(x, weight, bias), approximate=approximate)
        wide = (t.double() for t in (x, weight, bias))
        rule.compare("gelu", ours, torchs, F.gelu(F.linear(*wide), approximate=approximate))
    rule.assert_within()
    assert calls


def test_gelu_of_what_wants_a_gradient(calls):
    rule = ErrorRule()

    def gradients(gelu, tensors):
        inputs = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(gelu(*inputs).sum(), inputs)

    def torchs(*inputs):
        return F.gelu(F.linear(*inputs))

    for seed in SEEDS:
        wide = [t.float().double() for t in parts((9, 16, 12), seed)[:3]]
        narrow = [t.float() for t in wide]
        ours = gradients(lambda *t: products.linear_gelu(*t, "gelu"), narrow)
        sides = (ours, gradients(torchs, narrow), gradients(torchs, wide))
        for name, *values in zip(("dx", "dweight", "dbias"), *sides, strict=True):
            rule.compare(name, *values)
    rule.assert_within()
    assert calls


def test_no_matrix_with_gaps_reaches_onednn(monkeypatch):
    seen = []

    def pointwise(x, weight, bias, *rest):
        seen.append(weight.is_contiguous() or weight.t().is_contiguous())
        return F.linear(x, weight, bias)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", pointwise)
    # slices of a longer chain, and of a wider gradient
    ops.linear(torch.randn(4, 2500), torch.randn(16, 2500))
    products.weight_gradient(torch.randn(300, 96)[:, 32:], torch.randn(300, 128))
    assert len(seen) > 3
    assert all(seen)


def test_a_second_derivative():
    rule = ErrorRule()

    def penalty(linear, tensors):
        x, weight, bias = (t.clone().requires_grad_() for t in tensors)
        (slope,) = torch.autograd.grad(linear(x, weight, bias).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    for seed in SEEDS:
        wide = [t.float().double() for t in parts((3, 5, 4), seed)[:3]]
        narrow = [t.float() for t in wide]
        sides = (penalty(ops.linear, narrow), penalty(F.linear, narrow), penalty(F.linear, wide))
        rule.compare("dweight of a slope", *sides)
    rule.assert_within()


def test_gradients_by_themselves_are_differentiable():
    x, weight, _, gradient = (t.float().requires_grad_() for t in parts((7, 5, 4), 2))
    products.input_gradient(gradient, weight).sum().backward()
    products.weight_gradient(gradient, x, 0.5).sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in (x, weight, gradient))


@pytest.mark.parametrize("flowing", [torch.randn(2, 3, 4).double(), torch.ones(4).double()])
def test_more_than_two_dimensions_and_no_bias(flowing, calls):
    rule = ErrorRule()
    for seed in SEEDS:
        x, weight, _, _ = parts((6, 16, 4), seed)
        x = x.view(2, 3, 16)
        found = []
        for linear, dtype in (
            (ops.linear, torch.float32),
            (F.linear, torch.float32),
            (F.linear, torch.float64),
        ):
            inputs = [t.float().to(dtype).requires_grad_() for t in (x, weight)]
            output = linear(*inputs)
            # one gradient for all rows is a tensor without steps between them
            gradients = torch.autograd.grad(output, inputs, flowing.to(dtype).expand(2, 3, 4))
            found.append([output.detach(), *gradients])
        for name, *values in zip(("y", "dx", "dweight"), *found, strict=True):
            rule.compare(name, *values)
    rule.assert_within()
    assert calls


@pytest.mark.parametrize("dtype", OF_ONEDNN, ids=str)
@pytest.mark.parametrize("step", [0, 2])
def test_a_bias_with_steps_between_its_elements(dtype, step, calls):
    x, weight = torch.zeros(3, 8, dtype=dtype), torch.zeros(6, 8, dtype=dtype)
    bias = torch.arange(1, 13, dtype=dtype).as_strided((6,), (step,))
    assert torch.equal(ops.linear(x, weight, bias), bias.expand(3, 6))
    assert calls


def test_nothing_is_kept_for_a_gradient_that_nobody_wants():
    x, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)

    def kept(wanted):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(tensor is wanted)
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: found.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
        ):
            ops.linear(x, weight, bias).sum().backward()
        return found

    assert kept(bias) == []
    assert kept(x) == [(3, 8)]
    assert kept(weight) == [(4, 8)]


def test_derivatives_that_torch_transforms_take():
    x, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    tangent = torch.randn(3, 8)
    for linear in (ops.linear, lambda *t: products.linear_gelu(*t, "gelu")):
        _, found = torch.func.jvp(lambda w: linear(x, w, bias), (weight,), (tangent,))  # noqa: B023
        assert found.abs().max() > 0
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        assert forward_ad.unpack_dual(ops.linear(x, dual, bias)).tangent is not None
    assert torch.equal(
        torch.func.grad(lambda w: ops.linear(x, w, bias).sum())(weight),
        torch.func.grad(lambda w: F.linear(x, w, bias).sum())(weight),
    )
    weight.requires_grad_()
    (rows,) = torch.autograd.grad(
        ops.linear(x, weight, bias), weight, torch.eye(12).view(12, 4, 3), is_grads_batched=True
    )
    assert rows.shape == (12, 3, 8)


@needs_bf16
def test_autocast_casts_once_and_gradients_come_back_wide(calls):
    x, weight, bias = torch.randn(6, 16), nn.Parameter(torch.randn(8, 16)), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.linear(x, weight, bias)
    assert output.dtype == torch.bfloat16
    assert [w.dtype for w in calls] == [torch.bfloat16]
    output.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("weight", [torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 8).double()])
def test_what_autocast_cannot_cast_is_refused_by_torch(weight, calls):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        ops.linear(torch.randn(4, 8), weight, torch.randn(3))
    assert not calls


@pytest.mark.parametrize(
    "x, weight, bias",
    [
        (torch.randn(4, 8), torch.randn(3, 9), None),
        (torch.randn(4, 8), torch.randn(3, 8), torch.randn(5)),
        (torch.randn(4, 8), torch.randn(3, 8).double(), None),
    ],
)
def test_what_torch_refuses_is_refused_by_torch(x, weight, bias, calls):
    with pytest.raises(RuntimeError):
        ops.linear(x, weight, bias)
    assert not calls


def test_who_is_left_to_torch(calls, monkeypatch):
    x, weight, bias = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)
    ops.linear(x.double(), weight.double(), bias.double())
    ops.linear(x[0], weight, bias)
    ops.linear(x, weight.to_sparse_csr(), bias)
    ops.linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
    assert ops.linear(x[:0], weight, bias).shape == (0, 3)
    # without a bias torch itself takes oneDNN in 16 bits
    ops.linear(x.bfloat16(), weight.bfloat16())
    with torch.backends.mkldnn.flags(enabled=False):
        ops.linear(x, weight, bias)
    torch.jit.trace(lambda rows: ops.linear(rows, weight, bias), x, check_trace=False)
    torch.compile(lambda rows: ops.linear(rows, weight, bias), backend="eager", fullgraph=True)(x)
    monkeypatch.setattr(products, "has_slow_fp32", lambda: False)
    ops.linear(x, weight, bias)
    assert not calls


@pytest.mark.parametrize(
    "maker, flags, slow",
    [
        ("AuthenticAMD", "avx2 avx512f", True),
        ("AuthenticAMD", "avx2", False),
        ("GenuineIntel", "avx2 avx512f", False),
    ],
)
def test_whose_processor_is_slow_in_fp32(maker, flags, slow, tmp_path, monkeypatch):
    monkeypatch.undo()
    info = tmp_path / "cpuinfo"
    info.write_text(f"vendor_id\t: {maker}\nflags\t: {flags}\n")
    monkeypatch.setattr(products, "CPU_INFO", info)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.has_slow_fp32.__wrapped__() is slow
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.has_slow_fp32.__wrapped__()


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_gradients_by_themselves(scale, calls):
    rule = ErrorRule()
    for seed in SEEDS:
        x, weight, _, flowing = parts((600, 40, 72), seed)
        for dtype in DTYPES:
            narrow = [t.to(dtype) for t in (x, weight, flowing)]
            wide = [t.double() for t in narrow]
            del calls[:]
            dweight = products.weight_gradient(narrow[2], narrow[0], scale)
            dx = products.input_gradient(narrow[2], narrow[1])
            # in 16 bits torch takes oneDNN for these by itself
            assert bool(calls) == (dtype == torch.float32)
            torchs = (narrow[2].t() @ narrow[0]) * scale, narrow[2] @ narrow[1]
            rule.compare(f"dweight {dtype}", dweight, torchs[0], wide[2].t() @ wide[0] * scale)
            rule.compare(f"dx {dtype}", dx, torchs[1], wide[2] @ wide[1])
    rule.assert_within()
