from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import Pool, check_operator
from torch import Tensor

from fastbert.kernels import ops, reference
from fastbert.kernels.ops import Rng

DTYPES = [torch.float32, torch.bfloat16]


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# every oracle is its formula, written out anew in fp64; PyTorch's own function is the baseline


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.float64:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def plain_gelu(x: Tensor, activation: str) -> Tensor:
    if x.dtype != torch.float64:
        return F.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")
    if activation == "gelu":
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, hidden_size", [(0, 7), (1, 36), (33, 50), (17, 128)])
def test_layer_norm(rows, hidden_size, dtype):
    def inputs(generator):
        return {
            "x": normal(generator, rows, hidden_size) + 0.5,
            "weight": 1.0 + normal(generator, hidden_size, scale=0.3),
            "bias": normal(generator, hidden_size),
        }

    check_operator(
        lambda x, weight, bias: ops.layer_norm(x, weight, bias, eps=1e-5),
        lambda x, weight, bias: plain_norm(x, weight, bias, 1e-5),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_of_a_sum(biased, dropout_p, dtype):
    rng = Rng(4)

    def inputs(generator):
        return {
            "x": normal(generator, 31, 2 * 50)[:, ::2],
            "weight": 1.0 + normal(generator, 50, scale=0.3),
            "bias": normal(generator, 50),
            "residual": normal(generator, 31, 50),
        } | ({"x_bias": normal(generator, 50)} if biased else {})

    def ours(x, weight, bias, residual, x_bias=None):
        return ops.layer_norm(
            x, weight, bias, x_bias=x_bias, residual=residual, dropout_p=dropout_p, rng=rng
        )

    def theirs(x, weight, bias, residual, x_bias=None):
        total = x if x_bias is None else x + x_bias
        if dropout_p:
            wide = total.to(torch.promote_types(total.dtype, torch.float32))
            total = (wide * reference.keep_mask((31, 50), dropout_p, rng, wide)).to(total.dtype)
        return plain_norm(total + residual, weight, bias, 1e-12)

    check_operator(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_before_a_norm_are_wide_under_gradients_and_in_fp16(dtype):
    """bf16 inference alone takes torch's own sum; fp32 parameters, as under autocast."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (normal(generator, 33, 96).to(dtype) for _ in range(2))
    weight, bias = 1.0 + normal(generator, 96, scale=0.3).float(), normal(generator, 96).float()

    def ours(x):
        return ops.layer_norm_with_sum(x, weight, bias, residual=residual)

    rounded = F.layer_norm(x + residual, (96,), weight, bias, 1e-12)
    wide = F.layer_norm(x.float() + residual.float(), (96,), weight, bias, 1e-12).to(dtype)
    assert not torch.equal(rounded, wide)
    assert torch.equal(ours(x).output, rounded if dtype == torch.bfloat16 else wide)
    assert torch.equal(ours(x.clone().requires_grad_()).output, wide)
    assert torch.equal(ours(x).total, (x.float() + residual.float()).to(dtype))
    value, tangent = torch.func.jvp(lambda x: ours(x).output, (x,), (torch.ones_like(x),))
    assert torch.equal(value, wide) and tangent.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_16_bits_with_fp32_parameters_has_a_second_derivative(dtype):
    """As under autocast; of sum(c y^3), once to x and once more to the residual."""
    generator = torch.Generator().manual_seed(0)
    x, residual, factor = (normal(generator, 9, 64).to(dtype) for _ in range(3))
    weight, bias = 1.0 + normal(generator, 64, scale=0.3).float(), normal(generator, 64).float()

    def derivatives(norm, wide):
        a, b = (t.to(wide).requires_grad_() for t in (x, residual))
        y = norm(a, b)
        value = (y**3 * factor.to(wide)).sum()
        (first,) = torch.autograd.grad(value, a, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), b)
        return {"y": y.detach(), "first": first.detach(), "second": second}

    def plain(wide):
        parameters = [t.to(wide) for t in (weight, bias)]
        return derivatives(lambda a, b: plain_norm(a + b, *parameters, 1e-12), wide)

    ours = derivatives(lambda a, b: ops.layer_norm(a, weight, bias, residual=b), dtype)
    theirs, oracle = plain(dtype), plain(torch.float64)
    for name in oracle:
        pool = Pool(eps=torch.finfo(dtype).eps)
        pool.add(ours[name].double(), theirs[name].double(), oracle[name])
        assert pool.failures() == [], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("rows, biased", [(0, True), (1, False), (29, True)])
def test_feed_forward(rows, biased, activation, dtype):
    def inputs(generator):
        shapes = {"x": (rows, 24), "w1": (50, 24), "b1": (50,), "w2": (24, 50), "b2": (24,)}
        drawn = {name: normal(generator, *shape) for name, shape in shapes.items()}
        drawn["w1"], drawn["w2"] = drawn["w1"] / 24**0.5, drawn["w2"] / 50**0.5
        return drawn if biased else {n: t for n, t in drawn.items() if n != "b2"}

    def theirs(x, w1, b1, w2, b2=None):
        inner = plain_gelu(F.linear(x, w1, b1), activation)
        return F.linear(inner, w2, b2)

    check_operator(
        lambda x, w1, b1, w2, b2=None: ops.feed_forward(x, w1, b1, w2, b2, activation=activation),
        theirs,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_embedding(tokens, dtype):
    ids = torch.randint(0, 23, (tokens,))
    positions, types = torch.arange(tokens) % 11, torch.arange(tokens) % 2

    def inputs(generator):
        return {
            "word": normal(generator, 23, 36),
            "position": normal(generator, 11, 36),
            "token_type": normal(generator, 2, 36),
            "weight": 1.0 + normal(generator, 36, scale=0.3),
            "bias": normal(generator, 36),
        }

    def theirs(word, position, token_type, weight, bias):
        total = word[ids] + position[positions] + token_type[types]
        return plain_norm(total, weight, bias, 1e-12)

    check_operator(
        lambda word, position, token_type, weight, bias: ops.embedding(
            ids, positions, types, word, position, token_type, weight, bias
        ),
        theirs,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("real", [0, 5, 9])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_tail_of_an_embedding_is_zero_and_may_be_anything(dropout_p, real):
    ids = [torch.randint(0, 7, (9,)), torch.arange(9) % 3, torch.arange(9) % 2]
    tables = [torch.randn(size, 36) for size in (7, 3, 2)] + [torch.rand(36), torch.randn(36)]
    flow = torch.randn(9, 36)
    rows = torch.arange(9, dtype=torch.int32)
    rng = Rng(3, exact=True).rows(rows + 1, rows)
    results = []
    for count in (real, 9):
        columns = [column[:count].clone() for column in ids]
        for column in columns:
            column[real:] = 10**9
        upward = flow[:count].clone()
        upward[real:] = math.nan
        leaves = [t.clone().requires_grad_() for t in tables]
        layout = ops.Layout(torch.tensor([0, real, real], dtype=torch.int32), count, 9)
        own = rng.first(count)
        y = ops.embedding(*columns, *leaves, layout=layout, dropout_p=dropout_p, rng=own)
        y.backward(upward)
        assert (y[real:] == 0).all()
        results.append([y.detach()[:real], *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_embedding_and_a_layout_of_other_sizes():
    ids, table = torch.zeros(9, dtype=torch.int64), torch.randn(7, 36)
    layout = ops.Layout(torch.tensor([0, 5], dtype=torch.int32), 8, 8)
    with pytest.raises(ValueError, match="embedding: layout is for 8 tokens, got 9"):
        ops.embedding(ids, ids, ids, table, table, table, table[0], table[0], layout=layout)
