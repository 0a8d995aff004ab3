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

from fastbert.kernels import attention_blocks, ops, reference_attention
from fastbert.kernels.layout import Layout
from fastbert.kernels.ops import Rng
from fastbert.kernels.philox import score_mask, score_words
from fastbert.kernels.reference_attention import Plan

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
@pytest.mark.parametrize("fused", [True, False])
def test_attention_twice_differentiated(fused, lengths, dropout_p):
    bounds = cumulative(lengths)
    tokens = int(bounds[-1]) + 2
    layout = Layout(bounds, capacity=tokens, max_seqlen=max(lengths))
    rng = Rng(3)

    def ours(qkv):
        options = {"layout": layout, "dropout_p": dropout_p, "rng": rng}
        if fused:
            return ops.fused_qkv_attention(qkv, bounds, **options)
        return ops.attention(*qkv.unbind(1), bounds, **options)

    def theirs(qkv):
        query = qkv[:, 0]
        masks = iter(dropout_blocks(layout, query, dropout_p, rng))
        outputs = query * 0.0
        for start, end in itertools.pairwise(bounds.tolist()):
            q, k, v = (t[start:end].transpose(0, 1) for t in qkv.unbind(1))
            kept = F.softmax(q @ k.mT * query.shape[-1] ** -0.5, dim=-1) * next(masks)
            rows = torch.arange(start, end)
            outputs = outputs.index_copy(0, rows, (kept @ v).transpose(0, 1))
        return outputs

    def second_order(operator):
        def results(qkv, direction, flowing):
            output = operator(qkv)
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
    masks = reference_attention._attention_masks(Plan(layout, 1.0, dropout_p, rng), like)
    for group, mask in zip(layout.groups(like.dtype), masks, strict=True):
        first_rows = group.index.view(group.sequences, group.length)[:, 0].tolist()
        for start, block in zip(first_rows, mask, strict=True):
            size = bounds[bounds.index(start) + 1] - start
            blocks[start] = block[:, :size, :size]
    return [blocks[start] for start in bounds[:-1]]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_dropout_against_the_formula(dtype, chunk_bytes, monkeypatch):
    """The gradient uses the mask of the forward pass, in one chunk of groups and in several."""
    monkeypatch.setattr(attention_blocks, "CHUNK_BYTES", chunk_bytes)
    bounds = cumulative([20, 7, 16])
    layout = Layout(bounds, capacity=45, max_seqlen=20)
    rng = Rng(5, step=2)

    def theirs(qkv):
        query, key, value = qkv.unbind(1)
        # of the dtype that ours has, whose groups are others
        blocks = dropout_blocks(layout, query.to(dtype), 0.4, rng)
        outputs = []
        for (start, end), block in zip(itertools.pairwise(bounds.tolist()), blocks, strict=True):
            q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
            kept = F.softmax(q @ k.mT * query.shape[-1] ** -0.5, dim=-1) * block
            outputs.append((kept.to(v.dtype) @ v).transpose(0, 1))
        return torch.cat([*outputs, query[43:] * 0.0])

    check_operator(
        lambda qkv: ops.attention(*qkv.unbind(1), bounds, layout=layout, dropout_p=0.4, rng=rng),
        theirs,
        lambda generator: {"qkv": normal(generator, 45, 3, 2, 8)},
        dtype,
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


def formula(query, key, value, bounds, *, window=None, slopes=None, words=None, dropout_p=0.0):
    """Output and log-sum-exp, one sequence at a time, with everything that attention knows."""
    outputs, sums = [], []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        scores = q @ k.mT * query.shape[-1] ** -0.5
        place = torch.arange(end - start)
        ahead = place - place[:, None]
        if slopes is not None:
            scores = scores - slopes.to(scores)[:, None, None] * ahead.abs()
        if window is not None:
            scores = scores.masked_fill((ahead < -window[0]) | (ahead > window[1]), -math.inf)
        probabilities = F.softmax(scores, dim=-1)
        sums.append(torch.logsumexp(scores.double(), dim=-1).to(scores.dtype))
        if words is not None:
            mask = score_mask(*(part[:, start:end] for part in words), dropout_p)
            probabilities = probabilities * mask.to(scores)
        outputs.append((probabilities @ v).transpose(0, 1))
    tail = len(query) - bounds[-1]
    outputs.append(query[bounds[-1] :] * 0.0)
    sums.append(scores.new_full((query.shape[1], tail), -math.inf))
    return torch.cat(outputs), torch.cat(sums, dim=1)


VARIANTS = {
    "bare": {},
    "window": {"window": (3, 5)},
    "this token alone": {"window": (0, 0)},
    "one side": {"window": (100, 0)},
    "alibi": {"slopes": torch.tensor([0.5, 0.0625])},
    "everything": {"window": (9, 2), "slopes": torch.tensor([0.5, 0.0]), "dropout_p": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_window_alibi_dropout_and_log_sum_exp(variant, fused, dtype):
    options = VARIANTS[variant]
    bounds = cumulative([16, 16, 1, 0, 21, 40])
    tokens, heads, head_dim = 97, 2, 8
    rng = Rng(4, step=1, layer=2, exact=True)
    words = score_words(rng, tokens, heads) if "dropout_p" in options else None

    def ours(qkv):
        constants = {
            "window": options.get("window"),
            "alibi_slopes": options.get("slopes"),
            "dropout_p": options.get("dropout_p", 0.0),
            "rng": rng,
        }
        if fused:
            return ops.fused_qkv_attention(qkv, bounds, **constants)
        output, lse = ops.attention(*qkv.unbind(1), bounds, **constants, return_lse=True)
        return output, lse[:, :94]

    def theirs(qkv):
        output, lse = formula(*qkv.unbind(1), bounds.tolist(), **options, words=words)
        # the log-sum-exp is fp32 whatever the inputs are
        lse = lse[:, :94].to(torch.promote_types(lse.dtype, torch.float32))
        return output if fused else (output, lse)

    check_operator(
        ours,
        theirs,
        lambda generator: {"qkv": normal(generator, tokens, 3, heads, head_dim)},
        dtype,
    )


def test_log_sum_exp_of_the_tail_is_minus_infinity():
    qkv = torch.randn(9, 3, 2, 8)
    output, lse = ops.attention(*qkv.unbind(1), cumulative([3, 2]), return_lse=True)
    assert lse.shape == (2, 9) and lse.dtype == torch.float32
    assert (lse[:, 5:] == -math.inf).all() and lse[:, :5].isfinite().all()
    assert (output[5:] == 0).all()


def test_exact_masks_follow_the_sample_wherever_it_is_packed():
    qkv = torch.randn(12, 3, 2, 8)
    rng = Rng(3, exact=True)

    def run(order, lengths=(5, 4, 3)):
        edges = cumulative(list(lengths)).tolist()
        rows = torch.cat([torch.arange(edges[n], edges[n + 1]) for n in order])
        bounds = cumulative([lengths[n] for n in order])
        layout = Layout(bounds, len(rows), 5, torch.tensor(order) + 70)
        place = layout.rows()
        drawn = rng.rows(place.sample_ids, place.positions)
        output = ops.fused_qkv_attention(qkv[rows], bounds, dropout_p=0.5, rng=drawn)
        return torch.empty_like(output).index_copy_(0, rows, output) if len(rows) == 12 else output

    rule = ErrorRule()
    for order in ([2, 0, 1], [1, 2, 0], [0, 2, 1], [2, 1, 0], [1, 0, 2]):
        moved, still = run(order), run([0, 1, 2])
        rule.compare("output", moved, still, still.double())
    rule.assert_within()
    # without the ids it is the row of the stream that counts
    plain = [ops.fused_qkv_attention(qkv, cumulative([5, 4, 3]), dropout_p=0.5, rng=r)
             for r in (rng, Rng(3, micro_batch=1, exact=True))]  # fmt: skip
    assert not torch.equal(*plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype):
    tokens, heads, head_dim = 11, 2, 8
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 0])
    angles = torch.arange(6)[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)

    def theirs(qkv):
        # as complex numbers: the halves are real and imaginary parts
        turn = torch.polar(torch.ones(11, 4).double(), angles[positions])
        half = head_dim // 2
        wide = qkv[:, :2].double()
        turned = torch.complex(wide[..., :half], wide[..., half:]) * turn[:, None, None]
        query_key = torch.cat([turned.real, turned.imag], dim=-1).to(qkv.dtype)
        return torch.cat([query_key, qkv[:, 2:]], dim=1)

    check_operator(
        lambda qkv: ops.rotary(qkv, angles.cos().float(), angles.sin().float(), positions),
        theirs,
        lambda generator: {"qkv": normal(generator, tokens, 3, heads, head_dim)},
        dtype,
    )


QKV = torch.zeros(9, 3, 2, 8)
TABLE = torch.zeros(9, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.fused_qkv_attention(QKV[:, :2], cumulative([9])),
            r"fused_qkv_attention: qkv must be \[tokens, 3, .* got \[9, 2, 2, 8\]",
        ),
        (
            lambda: ops.fused_qkv_attention(QKV, cumulative([9]), window=(-1, 2)),
            r"window must be \(left, right\), none negative, got \(-1, 2\)",
        ),
        (
            lambda: ops.fused_qkv_attention(QKV, cumulative([9]), alibi_slopes=torch.ones(3)),
            r"alibi_slopes must be \[2\], one a head, got \[3\]",
        ),
        (
            lambda: ops.fused_qkv_attention(
                QKV, cumulative([9]), alibi_slopes=torch.ones(2, requires_grad=True)
            ),
            "alibi_slopes have no gradient",
        ),
        (lambda: ops.fused_qkv_attention(QKV, cumulative([9, 1])), "at most 9 tokens"),
        (
            lambda: ops.fused_qkv_attention(QKV, torch.tensor([0, 5, 3])),
            r"cu_seqlens: must ascend from 0 .* got \[0, 5, 3\]",
        ),
        (
            lambda: ops.rotary(QKV[:, 0], TABLE, TABLE, torch.arange(9)),
            r"rotary: qkv must be \[tokens, 3, heads, an even head_dim\], got \[9, 2, 8\]",
        ),
        (
            lambda: ops.rotary(QKV, TABLE, TABLE[:, :3], torch.arange(9)),
            r"cos and sin must both be \[positions, 4\], got \[9, 4\] and \[9, 3\]",
        ),
        (
            lambda: ops.rotary(QKV, TABLE, TABLE, torch.arange(8)),
            r"positions must be \[9\], one a token, got \[8\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[34], [5, 9, 0, 20]], ids=str)
def test_inputs_of_any_strides(lengths, dtype):
    bounds = cumulative(lengths)
    layout = Layout(bounds, capacity=36, max_seqlen=34)
    leaves = [torch.randn(36, 8, 2, dtype=dtype, requires_grad=True) for _ in range(3)]
    flow = torch.randn(36, 2, 8, dtype=dtype)
    results = []
    for contiguous in (False, True):
        parts = [leaf.transpose(1, 2) for leaf in leaves]
        parts = [part.contiguous() for part in parts] if contiguous else parts
        y = ops.attention(*parts, bounds, layout=layout)
        results.append([y, *torch.autograd.grad(y, leaves, flow)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(36, 0, 8), (36, 2, 0)])
def test_no_heads_at_all(shape):
    empty = torch.zeros(shape)
    with pytest.raises(ValueError, match="heads and head_dim must be at least 1, got"):
        ops.attention(empty, empty, empty, cumulative([36]))
