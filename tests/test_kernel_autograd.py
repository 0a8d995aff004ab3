"""The operators as torch sees them: registration, compilation, autocast, bad input."""

from __future__ import annotations

import shutil

import pytest
import torch
from kernel_harness import DEVICE, by, normal, runs_kernels
from oracle import check_operator

from fastbert.kernels import launch, ops
from fastbert.kernels.philox import Rng

pytestmark = runs_kernels

RNG = Rng(seed=5, step=2, layer=3, site=1, exact=True)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def norm_inputs(rows=6, width=64):
    x, residual = draw(rows, width), draw(rows, width)
    weight, bias, x_bias = draw(width), draw(width), draw(width)
    tensors = {"x": x, "weight": weight, "bias": bias, "x_bias": x_bias, "residual": residual}
    return {name: t.requires_grad_() for name, t in tensors.items()}


def feed_forward_inputs(rows=6, hidden=48, intermediate=64):
    tensors = {
        "x": draw(rows, hidden),
        "w1": draw(intermediate, hidden),
        "b1": draw(intermediate),
        "w2": draw(hidden, intermediate),
        "b2": draw(hidden),
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def layer_norm(**tensors):
    return ops.layer_norm(**tensors, dropout_p=0.1, rng=RNG.on(DEVICE))


def layer_norm_with_sum(**tensors):
    y, total = ops.layer_norm_with_sum(**tensors, dropout_p=0.1, rng=RNG.on(DEVICE))
    return y * 2 + total


def gated(x, w1, b1, w2, b2):
    return ops.gated_feed_forward(x, w1, w2[:, :32], b1=b1, b2=b2)


OPERATORS = [
    (layer_norm, norm_inputs),
    (layer_norm_with_sum, norm_inputs),
    (ops.feed_forward, feed_forward_inputs),
    (gated, feed_forward_inputs),
]


def results(operator, tensors):
    for tensor in tensors.values():
        tensor.grad = None
    output = operator(**tensors)
    output.square().sum().backward()
    return [output.detach(), *(t.grad for t in tensors.values())]


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_compiled_in_one_graph_with_the_same_results(operator, make):
    tensors = make()
    eager = results(operator, tensors)
    torch._dynamo.reset()
    compiled = results(torch.compile(operator, backend="aot_eager", fullgraph=True), tensors)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_opcheck():
    from fastbert.kernels import autograd

    x, vector, statistic = draw(6, 64), draw(64), draw(6)
    state = RNG.device_state(x.device)
    nothing = (None, None, None, 0, 0, 0.0)
    pre = draw(6, 64)
    calls = [
        (autograd.layer_norm_fwd, (x, vector, x + 1, vector, vector, *nothing, 1e-12,
                                   torch.float32, True, True)),
        (autograd.layer_norm_fwd, (x, None, None, vector, vector, state, None, None, 1, 2, 0.1,
                                   1e-12, torch.bfloat16, False, False)),
        (autograd.layer_norm_bwd, (x, None, x, vector, x, vector, statistic, statistic, state,
                                   None, None, 1, 2, 0.1, False, True, torch.float32,
                                   torch.float32)),
        (autograd.layer_norm_bwd, (x, x, x, None, None, vector, statistic, statistic, *nothing,
                                   True, False, torch.float32, None)),
        (autograd.bias_activation_fwd, (pre, vector, "gelu", False)),
        (autograd.bias_activation_fwd, (pre, vector, "gelu_new", True)),
        (autograd.bias_activation_bwd, (x, pre, vector, "gelu", False)),
        (autograd.bias_activation_bwd, (draw(6, 32), pre, None, "gelu", True)),
        (autograd.linear_activation, (x, draw(48, 64), draw(48), "gelu", True)),
        (autograd.linear_activation, (x, draw(48, 64), draw(48), "gelu", False)),
        (autograd.dropout_rows, (x, state, None, None, 1, 2, 0.1)),
    ]  # fmt: skip
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator, make", OPERATORS)
def test_autocast(operator, make, dtype):
    tensors = make()
    with torch.autocast(DEVICE, dtype=dtype):
        output = operator(**tensors)
    assert output.dtype == dtype
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())
    # the same numbers as with everything but the norms' parameters cast by hand
    names = [n for n in tensors if n not in ("weight", "bias", "x_bias", "b1", "b2")]
    cast = {n: t.detach().to(dtype) if n in names else t.detach() for n, t in tensors.items()}
    if "x_bias" in tensors:
        return
    assert torch.equal(operator(**cast), output)


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_a_second_derivative_is_refused_by_name(operator, make):
    tensors = make()
    output = operator(**tensors)
    with pytest.raises(RuntimeError, match=r"no second derivative .*use_backend\('reference'\)"):
        torch.autograd.grad(output.sum(), tensors["x"], create_graph=True)


@pytest.mark.parametrize("operator, make", OPERATORS)
def test_the_reference_has_a_second_derivative(operator, make):
    tensors = make()
    with ops.use_backend("reference"):
        output = operator(**tensors)
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors["x"], create_graph=True)
    gradient.sum().backward()
    assert tensors["x"].grad is not None


def test_without_gradients_nothing_is_kept():
    tensors = {name: t.detach() for name, t in norm_inputs().items()}
    assert layer_norm(**tensors).grad_fn is None
    with torch.no_grad():
        assert layer_norm(**norm_inputs()).grad_fn is None


BAD_NORMS = [
    ({"x": lambda t: t[0]}, r"x must be \[rows, 64\], got \[64\]"),
    ({"x": lambda t: t[:, :32]}, r"x must be \[rows, 64\], got \[6, 32\]"),
    ({"bias": lambda t: t[:32]}, r"bias must be \[64\], got \[32\]"),
    ({"x_bias": lambda t: t[:32]}, r"x_bias must be \[64\], got \[32\]"),
    ({"residual": lambda t: t[:3]}, r"residual must be \[6, 64\], got \[3, 64\]"),
    ({"x": lambda t: t.double()}, "x must be float32, float16 or bfloat16 .*float64"),
    ({"weight": lambda t: t.int()}, "weight must be float32, .*int32"),
    ({"x": lambda t: t.t().contiguous().t()}, r"x must be contiguous in its last .*\[1, 6\]"),
    ({"bias": lambda t: t.to("meta")}, f"bias must be on {DEVICE}.*, got meta"),
]


@pytest.mark.parametrize("change, message", BAD_NORMS)
def test_bad_input_of_layer_norm(change, message):
    tensors = {name: t.detach() for name, t in norm_inputs().items()}
    for name, spoil in change.items():
        tensors[name] = spoil(tensors[name])
    with pytest.raises(ValueError, match=f"^layer_norm: {message}"):
        ops.layer_norm(**tensors)


@pytest.mark.parametrize("width", [1, 31, 8193])
def test_widths_out_of_range(width):
    tensors = norm_inputs(2, width)
    with pytest.raises(ValueError, match=f"layer_norm: width must be 32 to 8192, got {width}"):
        ops.layer_norm(**tensors)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_dropout(dropout_p):
    with pytest.raises(ValueError, match=r"layer_norm: dropout_p must be in \[0, 1\), got"):
        ops.layer_norm(**norm_inputs(), dropout_p=dropout_p, rng=RNG)


def test_dropout_needs_an_rng():
    with pytest.raises(ValueError, match="needs an rng"):
        ops.layer_norm(**norm_inputs(), dropout_p=0.1)


def test_an_rng_for_other_rows():
    rng = RNG.rows(torch.zeros(4, dtype=torch.int32, device=DEVICE), None)
    with pytest.raises(ValueError, match=r"layer_norm: rng.sequence_ids must be \[6\]"):
        ops.layer_norm(**norm_inputs(), dropout_p=0.1, rng=rng)


BAD_FEED_FORWARDS = [
    ({"x": lambda t: t[:, :8]}, r"x must be \[rows, 48\], got \[6, 8\]"),
    ({"x": lambda t: t[0]}, r"x must be \[rows, 48\], got \[48\]"),
    ({"b1": lambda t: t[:8]}, r"b1 must be \[64\], got \[8\]"),
    ({"w2": lambda t: t.t()}, r"w2 must be \[48, 64\], got \[64, 48\]"),
    ({"b2": lambda t: t[:8]}, r"b2 must be \[48\], got \[8\]"),
    ({"w1": lambda t: t.double()}, "w1 must be float32, float16 or bfloat16"),
    ({"w1": lambda t: t.t().contiguous().t()}, "w1 must be contiguous in its last dimension"),
]


@pytest.mark.parametrize("change, message", BAD_FEED_FORWARDS)
def test_bad_input_of_feed_forward(change, message):
    tensors = {name: t.detach() for name, t in feed_forward_inputs().items()}
    for name, spoil in change.items():
        tensors[name] = spoil(tensors[name])
    with pytest.raises(ValueError, match=f"^feed_forward: {message}"):
        ops.feed_forward(**tensors)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_new, got 'relu'"):
        ops.feed_forward(**feed_forward_inputs(), activation="relu")


def test_the_default_for_these_tensors_is_triton():
    assert launch.uses_triton(draw(1))
    assert "Triton" in ops.describe(DEVICE)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")), reason="Inductor compiles C++"
)
def test_compiled_by_inductor():
    def block(x, w1, b1, w2, b2, weight):
        inner = ops.feed_forward(x, w1, b1, w2)
        return ops.layer_norm(inner, weight, b2 + 1, x_bias=b2, residual=x)

    def make(generator):
        shapes = {name: t.shape for name, t in feed_forward_inputs().items()} | {"weight": [48]}
        return {name: normal(generator, *shape) for name, shape in shapes.items()}

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    check_operator(compiled, by("reference", block), make, torch.float32, device=DEVICE)
