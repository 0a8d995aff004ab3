"""What only a GPU can show: CUDA graphs, and races that one run does not meet."""

from __future__ import annotations

import pytest
import torch

from fastbert.kernels import launch, ops
from fastbert.kernels.philox import Rng

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
