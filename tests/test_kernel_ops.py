from __future__ import annotations

import math

import pytest
import torch

from fastbert.kernels import ops
from fastbert.kernels.ops import Layout, Rng

BOUNDS = torch.tensor([0, 20, 36], dtype=torch.int32)


def calls(dropout_p: float, rng: Rng | None):
    """Every operator that drops out, on fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(36, 24, generator=generator) + 3.0
    weight, bias = torch.ones(24), torch.zeros(24)
    q, k, v = torch.randn(36, 3, 2, 12, generator=generator).unbind(1)
    ids = torch.arange(36) % 7
    options = {"dropout_p": dropout_p, "rng": rng}
    return {
        "dropout": ops.dropout(x, dropout_p, rng),
        "layer_norm": ops.layer_norm(x, weight, bias, **options),
        "embedding": ops.embedding(ids, ids, ids, x, x, x, weight, bias, **options),
        "attention": ops.attention(q, k, v, BOUNDS, **options),
    }


OPERATORS = list(calls(0.0, None))


@pytest.mark.parametrize("operator", OPERATORS)
def test_dropout_repeats_itself_and_follows_every_coordinate(operator):
    base = Rng(1, 2, 3, 4, 5)
    first = calls(0.5, base)[operator]
    assert torch.equal(first, calls(0.5, base)[operator])
    assert not torch.equal(first, calls(0.0, None)[operator])
    for other in (
        Rng(2, 2, 3, 4, 5),
        Rng(1, 3, 3, 4, 5),
        Rng(1, 2, 4, 4, 5),
        Rng(1, 2, 3, 5, 5),
        Rng(1, 2, 3, 4, 6),
    ):
        assert not torch.equal(first, calls(0.5, other)[operator])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_dropout_out_of_range(operator, dropout_p):
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got"):
        calls(dropout_p, Rng(0))[operator]


def test_dropout_without_rng():
    with pytest.raises(ValueError, match=r"dropout: dropout_p 0\.1 needs an rng"):
        calls(0.1, None)


def test_dropout_scale_is_unbiased():
    x, dropout_p = torch.ones(300, 300), 0.3
    dropped = ops.dropout(x, dropout_p, Rng(11))
    sigma = math.sqrt(dropout_p / (1.0 - dropout_p) / x.numel())
    assert abs(dropped.double().mean().item() - 1.0) < 5 * sigma


def test_attention_dropout_is_unbiased():
    """With values of one, an output is the sum of its kept probabilities."""
    qk, value = torch.zeros(36, 2, 12), torch.ones(36, 2, 12)
    outputs = torch.stack(
        [
            ops.attention(qk, qk, value, BOUNDS, dropout_p=0.3, rng=Rng(0, step))[..., 0]
            for step in range(60)
        ]
    )
    # of an output's variance: p / (1 - p) / length
    variance = 0.3 / 0.7 * (20 * (1 / 20) + 16 * (1 / 16)) * 2
    sigma = math.sqrt(variance * 60) / outputs.numel()
    assert abs(outputs.double().mean().item() - 1.0) < 5 * sigma


def test_dropout_gradient_is_the_mask():
    x = torch.ones(50, 50, requires_grad=True)
    dropped = ops.dropout(x, 0.4, Rng(2))
    dropped.backward(torch.ones_like(x))
    assert torch.equal(x.grad, dropped.detach())


def test_autocast_decides_the_dtype():
    x = torch.randn(36, 24, requires_grad=True)
    weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
    w1, w2 = torch.randn(50, 24, requires_grad=True), torch.randn(24, 50, requires_grad=True)
    ids = torch.arange(36) % 7
    labels = torch.arange(36) % 36
    with torch.autocast("cpu", torch.bfloat16):
        outputs = {
            "layer_norm": ops.layer_norm(x, weight, bias, residual=x),
            "feed_forward": ops.feed_forward(x, w1, torch.zeros(50), w2, bias),
            "embedding": ops.embedding(ids, ids, ids, x, x, x, weight, bias),
            "attention": ops.attention(*torch.randn(36, 3, 2, 12).unbind(1), BOUNDS),
        }
        loss, _ = ops.linear_cross_entropy(outputs["feed_forward"], x, labels)
    assert {name: t.dtype for name, t in outputs.items()} == dict.fromkeys(outputs, torch.bfloat16)
    assert loss.dtype == torch.float32
    (loss + outputs["layer_norm"].sum() + outputs["embedding"].sum()).backward()
    for parameter in (x, weight, bias, w1, w2):
        assert parameter.grad.dtype == torch.float32


def test_autocast_leaves_fp64_alone():
    x = torch.randn(5, 24, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        normed = ops.layer_norm(x, torch.ones(24).double(), torch.zeros(24).double())
    assert normed.dtype == torch.float64


X = torch.zeros(36, 24)
QKV = torch.zeros(36, 3, 2, 12).unbind(1)
IDS = torch.zeros(36, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.embedding(IDS, IDS[:5], IDS, X, X, X, X[0], X[0]),
            r"embedding: .*must all be \[tokens\].*\(36,\), \(5,\), \(36,\)",
        ),
        (
            lambda: ops.layer_norm(X[:, :5], X[0], X[0]),
            r"layer_norm: x must be \[rows, 24\], got \[36, 5\]",
        ),
        (
            lambda: ops.layer_norm(X, X[0], X[0, :5]),
            r"layer_norm: bias must be \[24\], got \[5\]",
        ),
        (
            lambda: ops.layer_norm(X, X[0], X[0], residual=X[:5]),
            r"layer_norm: residual must be \[36, 24\], got \[5, 24\]",
        ),
        (
            lambda: ops.layer_norm(X, X[0], X[0], x_bias=X),
            r"layer_norm: x_bias must be \[24\], got \[36, 24\]",
        ),
        (
            lambda: ops.feed_forward(X, X, X[:, 0], X.T, activation="relu"),
            "feed_forward: activation must be one of gelu, gelu_new, got 'relu'",
        ),
        (
            lambda: ops.feed_forward(X, X, X[0], X.T),
            r"feed_forward: b1 must be \[36\], got \[24\]",
        ),
        (
            lambda: ops.feed_forward(X, X, X[:, 0], X),
            r"feed_forward: w2 must be \[24, 36\], got \[36, 24\]",
        ),
        (
            lambda: ops.linear_cross_entropy(X, X[:7], IDS[:5]),
            r"linear_cross_entropy: hidden must be \[5, 24\], got \[36, 24\]",
        ),
        (
            lambda: ops.linear_cross_entropy(X, X[:7], IDS, X[0]),
            r"linear_cross_entropy: bias must be \[7\], got \[24\]",
        ),
        (
            lambda: ops.attention(*QKV, BOUNDS, layout=Layout(BOUNDS, 40, 20)),
            "attention: layout is for 40 tokens, got 36",
        ),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_attention_shapes_that_do_not_fit():
    query, key, value = QKV
    for arguments in ((query, key[:5], value), (query.flatten(1),) * 3):
        with pytest.raises(ValueError, match=r"^attention: "):
            ops.attention(*arguments, BOUNDS)
