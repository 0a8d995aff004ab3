from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import DEVICE, DTYPES, ON_GPU, few_examples, normal, runs_kernels
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import launch, ops
from fastbert.kernels.launch import Launch
from fastbert.kernels.layout import Layout
from fastbert.kernels.philox import Rng, score_mask, score_words

pytestmark = runs_kernels

RNG = Rng(seed=5, step=2, layer=3, site=1, exact=True)
SLOPES = torch.tensor([0.5, 0.0625], device=DEVICE)
MIXED = [5, 0, 17, 40, 1]
# longer than any tile that owns its sequences
LONG = 200
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.2, "rng": RNG},
    "window": {"window": (9, 4)},
    "alibi": {"alibi_slopes": SLOPES},
    "everything": {
        "dropout_p": 0.2,
        "rng": RNG,
        "window": (20, 3),
        "alibi_slopes": SLOPES,
        "softmax_scale": 0.4,
    },
}


def cumulative(lengths: list[int]) -> Tensor:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return bounds.to(DEVICE)


def layout_of(lengths: list[int], tail: int, max_seqlen: int, ids: bool = False) -> Layout:
    sample_ids = torch.arange(len(lengths), device=DEVICE) + 40 if ids else None
    return Layout(cumulative(lengths), sum(lengths) + tail, max_seqlen, sample_ids)


def check(lengths, dtype, *, tail=3, max_seqlen=64, heads=2, head_dim=32, fused=False, **options):
    """Held to the error rule; rows of the tail are NaN for ours, which must not notice."""
    layout = layout_of(lengths, tail, max_seqlen)
    bounds, real = layout.cu_seqlens, sum(lengths)
    if options.get("rng"):
        # of the reference on another device too
        options["rng"] = options["rng"].on(DEVICE)

    def operator(backend):
        def call(qkv):
            spoiled = qkv
            if backend == "triton" and qkv.dtype == dtype:
                spoil = torch.zeros_like(qkv)
                spoil[real:] = math.nan
                spoiled = qkv + spoil
            with ops.use_backend(backend):
                if fused:
                    return ops.fused_qkv_attention(spoiled, bounds, layout=layout, **options)
                output, lse = ops.attention(
                    *spoiled.unbind(1), bounds, layout=layout, **options, return_lse=True
                )
            return output, lse[:, :real]

        return call

    with poison():
        check_operator(
            operator("triton"),
            operator("reference"),
            lambda generator: {"qkv": normal(generator, real + tail, 3, heads, head_dim)},
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("max_seqlen", [64, LONG])
@pytest.mark.parametrize("variant", OPTIONS)
def test_every_variant_by_owned_and_by_flat_tiles(variant, max_seqlen):
    check(MIXED, torch.float32, max_seqlen=max_seqlen, **OPTIONS[variant])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("max_seqlen", [64, LONG])
def test_every_dtype(max_seqlen, dtype):
    check(MIXED, dtype, max_seqlen=max_seqlen, fused=True, **OPTIONS["everything"])


@pytest.mark.parametrize("max_seqlen", [64, LONG])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_every_head_size(head_dim, max_seqlen):
    check([3, 40], torch.float32, max_seqlen=max_seqlen, heads=1, head_dim=head_dim)


@pytest.mark.parametrize("lengths", [[150, 33, 1], [1, 130], [31, 32, 33, 63, 1, 65], [129]])
def test_sequences_longer_than_a_tile(lengths):
    check(lengths, torch.float32, max_seqlen=LONG, heads=1, **OPTIONS["dropout"])


@pytest.mark.parametrize("lengths", [[128, 100, 29], [1, 127, 2]])
def test_tiles_of_128_rows(lengths):
    forward, backward = Launch(128, 64, num_warps=8), Launch(128, 128, num_warps=8)
    with (
        launch.trying("attention_fwd_owned_128", forward),
        launch.trying("attention_bwd_owned_128", backward),
    ):
        check(lengths, torch.float32, max_seqlen=128, heads=1, **OPTIONS["dropout"])


@few_examples
@given(
    lengths=st.lists(st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64]), st.integers(0, 64)),
                     min_size=1, max_size=3),
    tail=st.sampled_from([0, 1, 70]),
    max_seqlen=st.sampled_from([64, LONG]),
)  # fmt: skip
def test_any_lengths(lengths, tail, max_seqlen):
    check(lengths, torch.float32, tail=tail, max_seqlen=max_seqlen, heads=1)


def run(qkv: Tensor, layout: Layout, flowing: Tensor | None = None, **options) -> list[Tensor]:
    """Output and gradient."""
    qkv = qkv.detach().clone().requires_grad_()
    with ops.use_backend("triton"):
        output = ops.fused_qkv_attention(qkv, layout.cu_seqlens, layout=layout, **options)
    if flowing is None:
        flowing = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
    output.backward(flowing.to(output))
    return [output.detach(), qkv.grad]


def drawn(tokens: int, heads: int = 2, head_dim: int = 32) -> Tensor:
    return torch.randn(tokens, 3, heads, head_dim, device=DEVICE)


# the last: rows of the tail share a tile, and key blocks that its real rows see whole
@pytest.mark.parametrize("lengths, max_seqlen", [([7, 20], 64), ([7, 20], LONG), ([40], LONG)])
def test_the_tail_is_exactly_zero(lengths, max_seqlen):
    real = sum(lengths)
    layout = layout_of(lengths, 100, max_seqlen)
    qkv = drawn(layout.capacity)
    qkv[real:] = math.nan
    flowing = torch.full((layout.capacity, 2, 32), math.nan, device=DEVICE)
    flowing[:real] = 1.0
    with poison():
        output, gradient = run(qkv, layout, flowing)
    assert (output[real:] == 0).all() and (gradient[real:] == 0).all()
    assert output[:real].isfinite().all() and gradient[:real].isfinite().all()
    assert gradient[:real].ne(0).any()


def test_a_wide_window_is_one_compilation_for_all_lengths():
    constants = []
    for length in (12, 20, 37):
        qkv = torch.zeros(length, 3, 2, 32, device=DEVICE)
        bounds = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
        with launch.recording() as calls, ops.use_backend("triton"):
            ops.fused_qkv_attention(
                qkv, bounds, layout=Layout(bounds, length, LONG), window=(64, 64)
            )
        constants.append([call.constants for call in calls])
    assert constants[0] == constants[1] == constants[2]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("max_seqlen", [64, LONG])
def test_no_sequences_are_a_valid_batch(max_seqlen, tail, lengths):
    layout = layout_of(lengths, tail, max_seqlen)
    with poison():
        output, gradient = run(drawn(tail), layout)
    assert output.shape == (tail, 2, 32) and (output == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("max_seqlen", [64, LONG])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_other_sequences_do_not_notice_changed_values_bit_for_bit(variant, max_seqlen):
    layout = layout_of(MIXED, 3, max_seqlen)
    qkv = drawn(layout.capacity)
    before = run(qkv, layout, **OPTIONS[variant])
    for start, end in ((0, 5), (22, 62)):
        changed = qkv.clone()
        changed[start:end] = -2.0 * qkv[start:end].roll(1, -1)
        after = run(changed, layout, **OPTIONS[variant])
        rest = torch.ones(layout.capacity, dtype=torch.bool, device=DEVICE)
        rest[start:end] = False
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old[rest], new[rest])
            assert not torch.equal(old[start:end], new[start:end])


@pytest.mark.parametrize("max_seqlen, value", [(64, math.nan), (64, math.inf), (LONG, math.nan)])
def test_a_nan_reaches_no_further_than_its_tile(max_seqlen, value):
    lengths = [50, 60, 3, 10, 20, 60]
    layout = layout_of(lengths, 3, max_seqlen)
    qkv = drawn(layout.capacity, heads=1)
    before = run(qkv, layout)
    dirty = qkv.clone()
    dirty[115] = value
    after = run(dirty, layout)
    # tiles of their own hold rows 110 to 143; flat ones of 32 rows, and key blocks of as many, end
    # where the next sequence does at most
    far = [*range(50), *range(143, layout.capacity)] if max_seqlen == 64 else [*range(0, 32)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[far], new[far])
    assert not after[0][113:123].isfinite().all()


def test_a_repeat_is_the_same_bit_for_bit():
    for max_seqlen in (64, LONG):
        layout = layout_of(MIXED, 3, max_seqlen)
        qkv = drawn(layout.capacity)
        first, second = (run(qkv, layout, **OPTIONS["everything"]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def probabilities(lengths: list[int], rng: Rng, tile: Launch, max_seqlen: int = LONG) -> Tensor:
    """[tokens, head_dim] of one head: entry j is what the row's key at place j weighs, 0 or 1/n."""
    layout = layout_of(lengths, 0, max_seqlen, ids=True)
    rows = layout.rows()
    qkv = torch.zeros(layout.capacity, 3, 2, 32, device=DEVICE)
    qkv[torch.arange(layout.capacity), 2, :, rows.positions.long()] = 1.0
    rng = rng.rows(rows.sample_ids, rows.positions)
    with ops.use_backend("triton"), launch.trying("attention_fwd", tile):
        return ops.fused_qkv_attention(
            qkv, layout.cu_seqlens, layout=layout, dropout_p=0.4, rng=rng
        )


@pytest.mark.parametrize("tile", [(64, 32), (32, 64), (128, 16)])
def test_dropped_scores_are_those_of_the_twin_whatever_the_tile(tile):
    lengths = [20, 31, 3, 32]
    kept = probabilities(lengths, RNG, Launch(*tile, num_warps=4)) > 0
    rows = layout_of(lengths, 0, LONG, ids=True).rows()
    rng = RNG.rows(rows.sample_ids, rows.positions)
    words = score_words(rng, sum(lengths), 2)
    for start, end in itertools.pairwise(cumulative(lengths).tolist()):
        mask = score_mask(*(part[:, start:end] for part in words), 0.4) > 0
        assert torch.equal(kept[start:end, :, : end - start].transpose(0, 1).cpu(), mask)


def test_masks_follow_the_sample_wherever_it_is_packed():
    tile = Launch(64, 64, num_warps=4)
    rows = layout_of([20, 31], 0, LONG, ids=True).rows()
    apart = probabilities([20, 31], RNG, tile)
    # the same samples behind another one, and in tiles of their own
    owned = probabilities([20, 31], RNG, tile, max_seqlen=64)
    assert torch.equal(apart > 0, owned > 0)
    assert rows.sample_ids.unique().tolist() == [40, 41]


def test_other_draws_differ():
    layout = layout_of([60], 0, LONG)
    qkv = drawn(60)
    first = run(qkv, layout, dropout_p=0.3, rng=RNG)[0]
    for other in (RNG.at(3, 2), RNG.at(4, 1), Rng(5, 3, 0, 3, 1), Rng(5, 2, 1, 3, 1)):
        assert not torch.equal(first, run(qkv, layout, dropout_p=0.3, rng=other)[0])


def test_another_batch_in_the_same_memory():
    """What a CUDA graph's replay does: shapes and addresses stay, lengths change."""
    for max_seqlen in (64, LONG):
        layout, other = (layout_of(lengths, tail, max_seqlen)
                         for lengths, tail in (([60, 3, 1], 6), ([10, 9, 50], 1)))  # fmt: skip
        qkv = drawn(70)
        layout.rows(), layout.tiles()
        layout.copy_(other)
        results = [run(qkv, each) for each in (layout, other)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_separate_tensors_with_strides_of_their_own():
    layout = layout_of(MIXED, 3, LONG)
    qkv = drawn(layout.capacity)
    parts = [
        qkv[:, 0].contiguous().requires_grad_(),
        qkv[:, 1].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        qkv.clone()[:, 2].requires_grad_(),
    ]
    with ops.use_backend("triton"):
        output = ops.attention(*parts, layout.cu_seqlens, layout=layout)
    flowing = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
    gradients = torch.autograd.grad(output, parts, flowing.transpose(0, 1).contiguous().mT.mT
                                    .transpose(0, 1))  # fmt: skip
    whole, gradient = run(qkv, layout)
    assert torch.equal(output, whole)
    assert torch.equal(torch.stack(gradients, dim=1), gradient)


def far_apart(tokens: int, stride: int, head_dim: int, folder: Path) -> Tensor:
    """[tokens, 3, 1, head_dim] fp16 with rows `stride` apart; on a host, in a sparse file."""
    size = tokens * stride
    if ON_GPU:
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.from_numpy(np.memmap(folder / "holes", np.float16, "w+", shape=(size,)))
    return memory.as_strided((tokens, 3, 1, head_dim), (stride, head_dim, head_dim, 1))


@pytest.mark.parametrize("max_seqlen", [64, LONG])
def test_offsets_beyond_32_bits(max_seqlen, tmp_path):
    tokens, stride = 260, (1 << 24) - 16
    # the first row of a tile lies beyond, not only its last
    assert 192 * stride > 1 << 31
    layout = layout_of([64, 30, 50, 60, 50], 6, max_seqlen)
    near = drawn(tokens, 1).half()
    far = far_apart(tokens, stride, 32, tmp_path)
    far.copy_(near)
    with ops.use_backend("triton"):
        outputs = []
        for qkv in (near, far):
            qkv = qkv.requires_grad_()
            output = ops.fused_qkv_attention(qkv, layout.cu_seqlens, layout=layout)
            (parts,) = torch.autograd.grad(output, qkv, torch.ones_like(output))
            outputs.append((output, parts))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


QKV = torch.zeros(9, 3, 2, 32, device=DEVICE)
BAD = [
    (
        lambda: ops.fused_qkv_attention(QKV[..., :20], cumulative([9])),
        "fused_qkv_attention: head_dim must be one of 32, 64, 96, 128 for Triton, got 20",
    ),
    (
        lambda: ops.attention(*QKV.double().unbind(1), cumulative([9])),
        "attention: query must be float32, float16 or bfloat16 for Triton",
    ),
    (
        lambda: ops.fused_qkv_attention(QKV.mT.contiguous().mT, cumulative([9])),
        "fused_qkv_attention: qkv must be contiguous in its last dimension",
    ),
    (
        lambda: ops.fused_qkv_attention(
            QKV, cumulative([9]), dropout_p=0.1, rng=RNG.rows(torch.zeros(4), None)
        ),
        r"fused_qkv_attention: rng.sequence_ids must be \[9\], one a row, got \[4\]",
    ),
    (
        lambda: ops.fused_qkv_attention(
            torch.empty(32, dtype=torch.float16, device=DEVICE).as_strided(
                (1, 3, 1, 32), (1 << 24, 0, 0, 1)
            ),
            cumulative([1]),
        ),
        "rows of qkv must lie less than 16777216 elements apart, got 16777216",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with ops.use_backend("triton"), pytest.raises(ValueError, match=message):
        call()


def attention(qkv):
    layout = layout_of([5, 4], 0, 64)
    return ops.fused_qkv_attention(
        qkv, layout.cu_seqlens, layout=layout, dropout_p=0.1, rng=RNG.on(DEVICE)
    )


def with_lse(qkv):
    output, lse = ops.attention(*qkv.unbind(1), cumulative([5, 4]), return_lse=True)
    return output * lse.t()[..., None]


def rotary(qkv):
    table = torch.linspace(0, 1, 9 * 16, device=DEVICE).view(9, 16)
    return ops.rotary(qkv, table, table + 1, torch.arange(9, device=DEVICE))


@pytest.mark.parametrize("operator", [attention, with_lse, rotary])
def test_compiled_in_one_graph_with_the_same_results(operator):
    qkv = drawn(9).requires_grad_()
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    results = []
    torch._dynamo.reset()
    for call in (operator, compiled):
        output = call(qkv)
        results.append((output, *torch.autograd.grad(output.square().sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("operator", [attention, with_lse, rotary])
def test_autocast_and_second_derivatives(operator):
    qkv = drawn(9).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = operator(qkv)
    assert output.dtype == (torch.float32 if operator is with_lse else torch.bfloat16)
    (gradient,) = torch.autograd.grad(output.sum(), qkv)
    assert gradient.dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"no second derivative .*use_backend\('reference'\)"):
        torch.autograd.grad(operator(qkv).sum(), qkv, create_graph=True)
    with torch.no_grad():
        assert operator(qkv).grad_fn is None


def test_opcheck():
    from fastbert.kernels import autograd_attention as module

    query, key, value = drawn(9).unbind(1)
    layout = layout_of([5, 4], 0, 64)
    rows = layout.rows()
    state = RNG.device_state(query.device)
    arguments = (state, rows.positions, None, 9, 2)
    torch.library.opcheck(module.attention_words.operator, arguments)
    words = module.attention_words(*arguments)
    table, positions = torch.rand(9, 16, device=DEVICE), torch.arange(9, device=DEVICE)
    bare = (rows.starts, rows.ends, None, 0, None, None, None, 0.2, None, None, 0, 0, 0.0)
    full = (rows.starts, rows.ends, layout.tiles(), 64, SLOPES, 3, 4, 0.2, words, state, 1, 2,
            0.1)  # fmt: skip
    for context in (bare, full):
        arguments = (query, key, value, *context)
        torch.library.opcheck(module.attention_fwd.operator, arguments)
        out, lse = module.attention_fwd(*arguments)
        for dlse in (None, lse):
            torch.library.opcheck(
                module.attention_bwd.operator, (out, dlse, query, key, value, out, lse, *context)
            )
    for inverse in (False, True):
        arguments = (drawn(9), table, table, positions, inverse)
        torch.library.opcheck(module.rotary_turn.operator, arguments)
