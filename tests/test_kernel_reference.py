from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SEEDS, ErrorRule, check_operator, poison
from torch import Tensor

from fastbert.kernels import ops, reference
from fastbert.kernels.layout import Layout
from fastbert.kernels.ops import Rng

DTYPES = [torch.float32, torch.bfloat16]
EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]
LENGTHS = [
    [],
    [0],
    [1],
    [17, 0, 1, 64],
    [16, 16, 16],
    [15, 16, 17],
    [63, 64, 65, 2],
    [127, 128, 129],
]
by_hand = settings(deadline=None, derandomize=True, max_examples=8)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# every oracle is its formula, written out anew in fp64; PyTorch's own function is the baseline


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
    """[tokens, heads, head_dim], one sequence at a time."""
    scale = query.shape[-1] ** -0.5
    outputs = [query.new_zeros(0, *query.shape[1:])]
    for start, end in itertools.pairwise(bounds):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        outputs.append((F.softmax(q @ k.mT * scale, dim=-1) @ v).transpose(0, 1))
    # the tail is zero, and stays on the graph
    outputs.append(query[bounds[-1] :] * 0.0)
    return torch.cat(outputs)


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


def check_attention(lengths, tail, heads, head_dim, dtype):
    bounds = cumulative(lengths)
    tokens = int(bounds[-1]) + tail
    layout = Layout(bounds, capacity=tokens, max_seqlen=max(lengths, default=0))

    def inputs(generator):
        return {"qkv": normal(generator, tokens, 3, heads, head_dim)}

    check_operator(
        lambda qkv: ops.attention(*qkv.unbind(1), bounds, layout=layout),
        lambda qkv: plain_attention(*qkv.unbind(1), bounds.tolist()),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention(lengths, dtype):
    check_attention(lengths, tail=3, heads=2, head_dim=16, dtype=dtype)


@by_hand
@given(
    st.lists(st.one_of(st.sampled_from(EDGES[:8]), st.integers(0, 40)), max_size=6),
    st.integers(0, 20),
    st.sampled_from([(1, 8), (3, 12), (2, 5)]),
    st.sampled_from(DTYPES),
)
def test_attention_on_any_lengths(lengths, tail, heads, dtype):
    check_attention(lengths, tail, *heads, dtype)


def test_attention_takes_a_scale():
    qkv = torch.randn(9, 3, 2, 8)
    bounds = cumulative([4, 5])
    ours = ops.attention(*qkv.unbind(1), bounds, softmax_scale=8**-0.5)
    assert torch.equal(ours, ops.attention(*qkv.unbind(1), bounds))
    other = ops.attention(*qkv.unbind(1), bounds, softmax_scale=1.0)
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("lengths", [[5, 5], [16, 16], [7, 3, 20]], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_twice_differentiated(lengths, dropout_p):
    bounds = cumulative(lengths)
    tokens = int(bounds[-1]) + 2
    layout = Layout(bounds, capacity=tokens, max_seqlen=max(lengths))
    rng = Rng(3)

    def ours(query, key, value):
        return ops.attention(query, key, value, bounds, layout=layout, dropout_p=dropout_p, rng=rng)

    def theirs(query, key, value):
        masks = iter(dropout_blocks(layout, query, dropout_p, rng))
        outputs = query * 0.0
        for start, end in itertools.pairwise(bounds.tolist()):
            q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
            kept = F.softmax(q @ k.mT * query.shape[-1] ** -0.5, dim=-1) * next(masks)
            rows = torch.arange(start, end)
            outputs = outputs.index_copy(0, rows, (kept @ v).transpose(0, 1))
        return outputs

    def second_order(operator):
        def results(qkv, direction, flowing):
            output = operator(*qkv.unbind(1))
            first = torch.autograd.grad((output * flowing).sum(), qkv, create_graph=True)[0]
            return output, first, torch.autograd.grad((first * direction).sum(), qkv)[0]

        return results

    rule = ErrorRule()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        arguments = [normal(generator, tokens, 3, 2, 8) for _ in range(2)]
        arguments.append(normal(generator, tokens, 2, 8))
        results = [
            second_order(operator)(
                arguments[0].to(dtype).requires_grad_(), *(a.to(dtype) for a in arguments[1:])
            )
            for operator, dtype in (
                (ours, torch.float32),
                (theirs, torch.float32),
                (theirs, torch.float64),
            )
        ]
        for name, *values in zip(("output", "gradient", "second"), *results, strict=True):
            rule.compare(name, *values)
    rule.assert_within()


def dropout_blocks(
    layout: Layout, like: Tensor, dropout_p: float, rng: Rng
) -> list[Tensor | float]:
    """Each sequence's mask [heads, length, length], in the order of the stream."""
    bounds = layout.cu_seqlens.tolist()
    if not dropout_p:
        return [1.0] * (len(bounds) - 1)
    blocks: dict[int, Tensor] = {}
    masks = reference._attention_masks(layout, like, dropout_p, rng)
    for group, mask in zip(layout.groups(), masks, strict=True):
        first_rows = group.index.view(group.sequences, group.length)[:, 0].tolist()
        for start, block in zip(first_rows, mask, strict=True):
            size = bounds[bounds.index(start) + 1] - start
            blocks[start] = block[:, :size, :size]
    return [blocks[start] for start in bounds[:-1]]


def test_attention_dropout_against_the_formula():
    """The gradient uses the mask of the forward pass."""
    bounds = cumulative([20, 7, 16])
    layout = Layout(bounds, capacity=45, max_seqlen=20)
    rng = Rng(5, step=2)

    def theirs(qkv):
        query, key, value = qkv.unbind(1)
        blocks = dropout_blocks(layout, query, 0.4, rng)
        outputs = []
        for (start, end), block in zip(itertools.pairwise(bounds.tolist()), blocks, strict=True):
            q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
            kept = F.softmax(q @ k.mT * query.shape[-1] ** -0.5, dim=-1) * block
            outputs.append((kept @ v).transpose(0, 1))
        return torch.cat([*outputs, query[43:] * 0.0])

    check_operator(
        lambda qkv: ops.attention(*qkv.unbind(1), bounds, layout=layout, dropout_p=0.4, rng=rng),
        theirs,
        lambda generator: {"qkv": normal(generator, 45, 3, 2, 8)},
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poisoned_tail_reaches_nothing(dtype):
    bounds = cumulative([16, 16, 5])
    tokens, heads, head_dim = 50, 2, 8
    clean = torch.randn(tokens, 3, heads, head_dim, dtype=dtype)
    dirty = clean.clone()
    dirty[37:] = math.nan
    flowing = torch.randn(tokens, heads, head_dim, dtype=dtype)
    flowing_dirty = flowing.clone()
    flowing_dirty[37:] = math.nan
    results = []
    for qkv, gradient in ((clean, flowing), (dirty, flowing_dirty)):
        qkv = qkv.clone().requires_grad_()
        with poison():
            output = ops.attention(
                *qkv.unbind(1), bounds, layout=Layout(bounds, capacity=tokens, max_seqlen=16)
            )
            query_grad = torch.autograd.grad(output, qkv, gradient)[0]
        results.append((output, query_grad))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
        assert (actual[37:] == 0).all() and actual[:37].ne(0).any()


def test_a_poisoned_sequence_stays_where_it_is():
    bounds = cumulative([16, 16, 5, 4])
    qkv = torch.randn(41, 3, 2, 8)
    dirty = qkv.clone()
    dirty[16:32] = math.nan
    clean_output = ops.attention(*qkv.unbind(1), bounds)
    dirty_output = ops.attention(*dirty.unbind(1), bounds)
    others = [*range(16), *range(32, 41)]
    assert torch.equal(clean_output[others], dirty_output[others])
    assert dirty_output[16:32].isnan().all()


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
