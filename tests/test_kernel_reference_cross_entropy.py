from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import ops
from fastbert.kernels import reference_cross_entropy as reference

DTYPES = [torch.float32, torch.bfloat16]
by_hand = settings(deadline=None, derandomize=True, max_examples=8)
# label smoothing and z-loss weight
EXTRAS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)]


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# the oracle is the formula, written out anew in fp64; PyTorch's own function is the baseline
def plain_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    kept = labels != ignore_index
    if logits.dtype != torch.float64:
        wide = logits.float()
        loss = F.cross_entropy(
            wide, labels, ignore_index=ignore_index, reduction="sum", label_smoothing=smoothing
        )
        return loss + z_loss * (wide.logsumexp(1).square() * kept).sum() if z_loss else loss
    right = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    lse = torch.logsumexp(logits, dim=1)
    target = (1.0 - smoothing) * right + smoothing * logits.mean(dim=1)
    return ((lse - target + z_loss * lse.square()) * kept).sum()


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


# chunks of logits, each in pieces; or one chunk, whose weight gradient is made in backward
@pytest.mark.parametrize("at_once, piece", [(67 * 7, 67 * 3), (67 * 40, 67 * 9)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing, z_loss", EXTRAS)
def test_linear_cross_entropy_in_chunks(smoothing, z_loss, dtype, at_once, piece, monkeypatch):
    labels = some_labels(40, 67)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(reference, "PIECE", piece)

    def ours(hidden, weight, bias):
        return ops.linear_cross_entropy(
            hidden, weight, labels, bias, label_smoothing=smoothing, z_loss=z_loss
        )[0]

    check_operator(
        ours,
        lambda hidden, weight, bias: plain_cross_entropy(
            hidden, weight, bias, labels, smoothing=smoothing, z_loss=z_loss
        ),
        lambda generator: cross_entropy_inputs(generator, 40, 24, 67),
        dtype,
    )


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch is older than 2.13"
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_torch_agrees(smoothing):
    """A second oracle, by other people: torch's own operator."""
    labels = some_labels(40, 67)

    def theirs(hidden, weight, bias):
        return F.linear_cross_entropy(
            hidden,
            weight,
            labels,
            linear_bias=bias,
            reduction="sum",
            label_smoothing=smoothing,
            # the chunked path knows no label smoothing
            options=None if smoothing else torch.nn.LinearCrossEntropyOptions(),
        )

    check_operator(
        lambda hidden, weight, bias: ops.linear_cross_entropy(
            hidden, weight, labels, bias, label_smoothing=smoothing
        )[0],
        theirs,
        lambda generator: cross_entropy_inputs(generator, 40, 24, 67),
        torch.float32,
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
@pytest.mark.parametrize("smoothing, z_loss", EXTRAS)
def test_poisoned_ignored_rows_reach_nothing(smoothing, z_loss, dtype):
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
            loss, correct = ops.linear_cross_entropy(
                hidden, weight, labels, bias, label_smoothing=smoothing, z_loss=z_loss
            )
            loss.backward()
        results.append((loss, correct, hidden.grad, weight.grad, bias.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[1][2][labels == -100] == 0).all()


@pytest.mark.parametrize("at_once", [67, 67 * 9])
def test_backward_twice_gives_the_same_again(at_once, monkeypatch):
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", at_once)
    leaves = [torch.randn(9, 24), torch.randn(67, 24), torch.randn(67)]
    hidden, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    loss, _ = ops.linear_cross_entropy(hidden, weight, some_labels(9, 67), bias)
    first = torch.autograd.grad(0.5 * loss, leaves, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(0.5 * loss, leaves), strict=True):
        assert torch.equal(one, other)


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
        hidden,
        torch.randn(5, 4),
        torch.tensor([0, 1, 2]),
        torch.zeros(5),
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": LABELS.int()}, r"labels must be \[rows\] int64, got \[3\] torch.int32"),
        ({"labels": LABELS[:, None]}, r"labels must be \[rows\] int64, got \[3, 1\]"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": math.nan}, r"label_smoothing must be in \[0, 1\], got nan"),
        ({"z_loss": -1.0}, "z_loss must be at least 0 and finite, got -1.0"),
        ({"z_loss": math.inf}, "z_loss must be at least 0 and finite, got inf"),
    ],
)
def test_bad_input(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": LABELS}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(**{**arguments, **change})
