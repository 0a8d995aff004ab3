"""What only a GPU can show of the embedding and the masked-LM head: graphs, races, no waiting."""

from __future__ import annotations

import pytest
import torch

from fastbert.kernels import launch, ops
from fastbert.kernels.philox import Rng

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter has no graphs and no races"),
]

REPEATS, HIDDEN = 50, 768
TOKENS, MASKED, VOCABULARY = 4096, 615, 30522


def ends_of_a_model() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters of an embedding and a masked-LM head that share their table, and a batch."""
    shapes = [
        (VOCABULARY, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,),
        (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,), (VOCABULARY,),
    ]  # fmt: skip
    parameters = [(torch.randn(*shape, device="cuda") / 30).requires_grad_() for shape in shapes]
    columns = {
        "words": torch.randint(0, 999, (TOKENS,), device="cuda"),
        "places": torch.arange(TOKENS, device="cuda") % 512,
        "segments": torch.arange(TOKENS, device="cuda") % 3 // 2,
        "bounds": torch.tensor([0, 2000, 4000, 4000], dtype=torch.int32, device="cuda"),
        "positions": torch.randperm(4000, device="cuda")[:MASKED],
        "labels": torch.randint(0, VOCABULARY, (MASKED,), device="cuda"),
    }
    return parameters, columns


def ends_step(
    parameters: list[torch.Tensor], columns: dict[str, torch.Tensor], rng: Rng
) -> list[torch.Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        hidden_states = ops.embedding(
            columns["words"],
            columns["places"],
            columns["segments"],
            *parameters[:5],
            layout=ops.Layout(columns["bounds"], TOKENS, 2000),
            dropout_p=0.1,
            rng=rng,
        )
        loss, correct = ops.masked_lm_loss(
            hidden_states,
            columns["positions"],
            columns["labels"],
            *parameters[5:9],
            parameters[0],
            parameters[9],
        )
    return [loss.detach(), correct, *torch.autograd.grad(loss / MASKED, parameters)]


def test_embedding_and_head_repeat_themselves():
    parameters, columns = ends_of_a_model()
    rng = Rng(seed=1).on("cuda")
    first = ends_step(parameters, columns, rng)
    for _ in range(REPEATS):
        again = ends_step(parameters, columns, rng)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_embedding_and_head_wait_for_nothing():
    parameters, columns = ends_of_a_model()
    rng = Rng(seed=1).on("cuda")
    ends_step(parameters, columns, rng)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ends_step(parameters, columns, rng)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_its_batch():
    parameters, columns = ends_of_a_model()
    rng = Rng(seed=1).on("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ends_step(parameters, columns, rng)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ends_step(parameters, columns, rng)
    for number in (7, 8):
        _, other = ends_of_a_model()
        # fewer tokens, fewer targets
        other["bounds"] = torch.tensor([0, 100, 3000, 3500], dtype=torch.int32, device="cuda")
        other["labels"][number::number] = -100
        other["positions"] = torch.randperm(3500, device="cuda")[:MASKED]
        for name, column in columns.items():
            column.copy_(other[name])
        rng.state.copy_(torch.tensor([1, number, 0]))
        graph.replay()
        expected = ends_step(parameters, columns, Rng(seed=1, step=number).on("cuda"))
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
