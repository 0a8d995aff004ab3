"""What only a GPU can show: CUDA graphs, and races that one run does not meet."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from kernel_harness import never_waiting
from oracle import check_operator
from tiny import random_corpus, tiny_tokenizer

from fastbert.config import EncoderConfig
from fastbert.data.objectives import Objective
from fastbert.data.stream import PretrainingStream, StreamConfig
from fastbert.kernels import launch, ops
from fastbert.kernels.layout import Layout
from fastbert.kernels.philox import Rng
from fastbert.models import BertForPreTraining
from fastbert.training.loss_scale import LossScale
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.step import WARM_STEPS, CapturedStep, TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no graphs and no races"),
]

REPEATS = 250
ROWS, HIDDEN, INTERMEDIATE = 3001, 768, 3072


def block(tensors: dict[str, torch.Tensor], rng: Rng) -> torch.Tensor:
    """Feed-forward and its norm, as in an encoder layer."""
    inner = ops.feed_forward(tensors["x"], tensors["w1"], tensors["b1"], tensors["w2"])
    return ops.layer_norm(
        inner,
        tensors["weight"],
        tensors["bias"],
        x_bias=tensors["b2"],
        residual=tensors["x"],
        dropout_p=0.1,
        rng=rng,
    )


def inputs() -> dict[str, torch.Tensor]:
    shapes = {
        "x": (ROWS, HIDDEN),
        "w1": (INTERMEDIATE, HIDDEN),
        "b1": (INTERMEDIATE,),
        "w2": (HIDDEN, INTERMEDIATE),
        "b2": (HIDDEN,),
        "weight": (HIDDEN,),
        "bias": (HIDDEN,),
    }
    return {
        name: (torch.randn(*shape, device="cuda") * shape[-1] ** -0.5).bfloat16().requires_grad_()
        for name, shape in shapes.items()
    }


def step(tensors: dict[str, torch.Tensor], rng: Rng) -> list[torch.Tensor]:
    output = block(tensors, rng)
    gradients = torch.autograd.grad(output, list(tensors.values()), output.detach())
    return [output.detach(), *gradients]


def test_a_captured_graph_replays_with_fresh_masks():
    tensors, rng = inputs(), Rng(seed=1).on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(tensors, rng)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, rng)
    for number in (7, 8):
        rng.state.copy_(torch.tensor([1, number, 0]))
        graph.replay()
        expected = step(tensors, Rng(seed=1, step=number).on("cuda"))
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_repeats_never_differ():
    tensors, rng = inputs(), Rng(seed=1).on("cuda")
    first = step(tensors, rng)
    for _ in range(REPEATS):
        again = step(tensors, rng)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def trained(name: str, dtype: torch.dtype, *, captured: bool, steps: int) -> dict:
    """Weights, moments and losses after some steps, of which the later ones may not wait."""
    tokenizer = tiny_tokenizer()
    config = EncoderConfig.named(
        "tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=64
    )
    model = BertForPreTraining.from_config(config).to("cuda")
    optimizers = Optimizers(model, name, learning_rate=1e-3, muon_learning_rate=2e-3)
    if dtype == torch.float16:
        optimizers.loss_scale = LossScale(torch.device("cuda"))
    eager = TrainingStep(model, optimizers, dtype, clip_norm=1.0)
    run = CapturedStep(eager) if captured else eager
    stream = StreamConfig(Objective("sop"), token_budget=512, max_seq_len=64, fixed_shapes=True)
    batches = PretrainingStream(random_corpus(40), tokenizer, stream)
    losses = []
    for number, batch in enumerate(itertools.islice(batches, steps)):
        with never_waiting() if number > WARM_STEPS else contextlib.nullcontext():
            result = run([batch], Rng(5, number), (number + 1) / steps)
        losses.append(result.sums["masked_lm_loss"])
    if captured:
        assert run.replayed == steps - WARM_STEPS
    return {**model.state_dict(), **optimizers.state_tensors(), "losses": torch.stack(losses)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_is_the_eager_one_and_neither_waits_for_the_device(name, dtype):
    steps = WARM_STEPS + 5
    eager = trained(name, dtype, captured=False, steps=steps)
    graph = trained(name, dtype, captured=True, steps=steps)
    assert eager.keys() == graph.keys()
    for key, value in eager.items():
        assert torch.equal(value, graph[key]), key


def attention_layout(lengths: list[int], max_seqlen: int) -> Layout:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.arange(len(lengths)) + 3
    return Layout(bounds, ROWS, max_seqlen, ids).to("cuda")


def attention_step(qkv: torch.Tensor, layout: Layout, rng: Rng) -> list[torch.Tensor]:
    rows = layout.rows()
    rng = rng.rows(rows.sample_ids, rows.positions)
    output = ops.fused_qkv_attention(qkv, layout.cu_seqlens, layout=layout, dropout_p=0.1, rng=rng)
    return [output.detach(), *torch.autograd.grad(output, qkv, torch.ones_like(output))]


# lengths of equal number for tiles of their own, 64 and 128 rows, and for flat ones
BATCHES = [
    ([50] * 40 + [64] * 10, [7] * 49 + [0], 64),
    ([128] * 12 + [100] * 8, [1] * 19 + [128], 128),
    ([512] * 4 + [1] * 6, [13, 1, 900, 0, 512, 300, 1, 1, 64, 65], 1024),
]


@pytest.mark.parametrize("captured, replayed, max_seqlen", BATCHES)
def test_a_captured_attention_replays_with_other_lengths(captured, replayed, max_seqlen):
    layout = attention_layout(captured, max_seqlen)
    other = attention_layout(replayed, max_seqlen)
    qkv = torch.randn(ROWS, 3, 12, 64, device="cuda").bfloat16().requires_grad_()
    rng = Rng(seed=1).on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attention_step(qkv, layout, rng)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attention_step(qkv, layout, rng)
    layout.copy_(other)
    rng.state.copy_(torch.tensor([1, 9, 0]))
    graph.replay()
    expected = attention_step(qkv, other, Rng(seed=1, step=9).on("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("lengths, _, max_seqlen", BATCHES)
def test_attention_never_differs(lengths, _, max_seqlen):
    layout = attention_layout(lengths, max_seqlen)
    qkv = torch.randn(ROWS, 3, 12, 64, device="cuda").bfloat16().requires_grad_()
    rng = Rng(seed=1).on("cuda")
    first = attention_step(qkv, layout, rng)
    for _ in range(REPEATS):
        again = attention_step(qkv, layout, rng)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_layout_made_on_the_device_waits_for_nothing():
    bounds = torch.tensor([0, 60, 61, 61, 100], dtype=torch.int32, device="cuda")
    expected = Layout(bounds.cpu(), 130, 64)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layout = Layout(bounds, 130, 64)
        rows, tiles = layout.rows(), layout.tiles()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(torch.stack(rows[:3]).cpu(), torch.stack(expected.rows()[:3]))
    assert torch.equal(tiles.cpu(), expected.tiles())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_beside_short_ones(dtype):
    lengths = [1, 8192, 1, 1, 700, 512, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(bounds, sum(lengths) + 60, 8192).to("cuda")
    rng = Rng(seed=1, exact=True).on("cuda")

    def call(backend):
        def on_backend(qkv):
            with ops.use_backend(backend):
                return ops.fused_qkv_attention(
                    qkv, layout.cu_seqlens, layout=layout, dropout_p=0.1, rng=rng
                )

        return on_backend

    def inputs(generator):
        shape = (layout.capacity, 3, 2, 64)
        return {"qkv": torch.randn(*shape, generator=generator, dtype=torch.float64)}

    check_operator(call("triton"), call("reference"), inputs, dtype, device="cuda")
