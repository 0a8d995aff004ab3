from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import ops, reference
from fastbert.kernels.ops import Rng

DTYPES = [torch.float32, torch.bfloat16]
EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]
by_hand = settings(deadline=None, derandomize=True, max_examples=8)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


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


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int = -100
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        wide = logits.float()
        return F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="sum")
    kept = labels != ignore_index
    right = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return ((torch.logsumexp(logits, dim=1) - right) * kept).sum()


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
def test_layer_norm_of_a_sum(dropout_p, dtype):
    rng = Rng(4)

    def inputs(generator):
        return {
            "x": normal(generator, 31, 2 * 50)[:, ::2],
            "weight": 1.0 + normal(generator, 50, scale=0.3),
            "bias": normal(generator, 50),
            "x_bias": normal(generator, 50),
            "residual": normal(generator, 31, 50),
        }

    def ours(x, weight, bias, x_bias, residual):
        return ops.layer_norm(
            x, weight, bias, x_bias=x_bias, residual=residual, dropout_p=dropout_p, rng=rng
        )

    def theirs(x, weight, bias, x_bias, residual):
        total = x + x_bias
        if dropout_p:
            total = total * reference.keep_mask((31, 50), dropout_p, rng, total)
        return plain_norm(total + residual, weight, bias, 1e-12)

    check_operator(ours, theirs, inputs, dtype)


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


def cross_entropy_inputs(generator, rows, hidden_size, vocab_size):
    return {
        "hidden": normal(generator, rows, hidden_size),
        "weight": normal(generator, vocab_size, hidden_size, scale=hidden_size**-0.5),
        "bias": normal(generator, vocab_size),
    }


def some_labels(rows: int, vocab_size: int, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(0, vocab_size, (rows,))
    labels[::3] = ignore_index
    return labels


@by_hand
@given(st.integers(0, 70), st.sampled_from([2, 67, 101]), st.sampled_from(DTYPES))
def test_linear_cross_entropy(rows, vocab_size, dtype):
    labels = some_labels(rows, vocab_size)
    check_operator(
        lambda hidden, weight, bias: ops.linear_cross_entropy(hidden, weight, labels, bias)[0],
        lambda hidden, weight, bias: plain_cross_entropy(hidden, weight, bias, labels),
        lambda generator: cross_entropy_inputs(generator, rows, 24, vocab_size),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy_in_chunks(dtype, monkeypatch):
    labels = some_labels(40, 67)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", 67 * 7)
    check_operator(
        lambda hidden, weight, bias: ops.linear_cross_entropy(hidden, weight, labels, bias)[0],
        lambda hidden, weight, bias: plain_cross_entropy(hidden, weight, bias, labels),
        lambda generator: cross_entropy_inputs(generator, 40, 24, 67),
        dtype,
    )


def test_chunks_and_the_whole_count_alike(monkeypatch):
    hidden, weight, bias = torch.randn(40, 24), torch.randn(67, 24), torch.randn(67)
    labels = (hidden @ weight.T + bias).argmax(dim=1)
    labels[::2] = some_labels(20, 67)
    whole = ops.linear_cross_entropy(hidden, weight, labels, bias)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", 1)
    single = ops.linear_cross_entropy(hidden, weight, labels, bias)
    expected = ((hidden @ weight.T + bias).argmax(dim=1) == labels).sum()
    assert whole.correct == single.correct == expected
    assert expected >= 20
    assert whole.correct.dtype == torch.int64 and not whole.correct.requires_grad


def test_linear_cross_entropy_without_bias_and_with_another_ignore_index():
    hidden, weight = torch.randn(9, 24), torch.randn(67, 24)
    labels = some_labels(9, 67, ignore_index=-1)
    with_zeros = ops.linear_cross_entropy(hidden, weight, labels, torch.zeros(67), ignore_index=-1)
    without = ops.linear_cross_entropy(hidden, weight, labels, ignore_index=-1)
    assert without.loss_sum == with_zeros.loss_sum
    labels[labels == -1] = -100
    assert ops.linear_cross_entropy(hidden, weight, labels).loss_sum == without.loss_sum


@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_ignored_rows_reach_nothing(dtype):
    labels = some_labels(20, 67)
    results = []
    for filling in (0.0, math.nan):
        hidden = torch.randn(20, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
        hidden[labels == -100] = filling
        hidden.requires_grad_()
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(67, 24, generator=generator).requires_grad_()
        bias = torch.randn(67, generator=generator).requires_grad_()
        with poison():
            loss, correct = ops.linear_cross_entropy(hidden, weight, labels, bias)
            loss.backward()
        results.append((loss, correct, hidden.grad, weight.grad, bias.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[1][2][labels == -100] == 0).all()


def test_all_rows_ignored():
    hidden, weight = torch.randn(5, 24, requires_grad=True), torch.randn(67, 24, requires_grad=True)
    loss, correct = ops.linear_cross_entropy(hidden, weight, torch.full((5,), -100))
    loss.backward()
    assert loss == 0 and correct == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_a_master_weight_gets_a_gradient_of_its_own_dtype():
    hidden = torch.randn(30, 24, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(67, 24, requires_grad=True), torch.randn(67, requires_grad=True)
    loss, _ = ops.linear_cross_entropy(hidden, weight, some_labels(30, 67), bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight = torch.full((2, 4), 100.0), torch.full((5, 4), 100.0)
    loss, _ = ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 3]))
    assert loss == torch.tensor(5.0).log() * 2


def test_a_second_derivative_of_the_loss_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    loss, _ = reference.linear_cross_entropy(
        hidden, torch.randn(5, 4), torch.tensor([0, 1, 2]), torch.zeros(5), ignore_index=-100
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
