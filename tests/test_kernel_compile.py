"""torch.compile of the encoder: one graph, made once, for packed batches of any content."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_harness import DEVICE, runs_kernels
from tiny import stirred, tiny_config, tiny_examples

from fastbert.encoder import Encoder, initialise
from fastbert.kernels.ops import Rng
from fastbert.packing import Capacity

pytestmark = runs_kernels

CAPACITY = Capacity(tokens=48, sequences=5, masked=12)


def encoder_of() -> Encoder:
    config = tiny_config(hidden_size=64, num_attention_heads=2, intermediate_size=96)
    model = Encoder(config)
    initialise(model, config, 0)
    return stirred(model).to(DEVICE)


def batch_of(lengths: list[int], seed: int):
    examples = tiny_examples(lengths, seed=seed)
    examples.sample_ids = np.arange(len(lengths)) + 10 * seed
    batch = examples.batch(range(len(lengths)), CAPACITY)
    # of the stream's configuration, the same for every batch
    batch.max_seqlen = 32
    batch = batch.to(DEVICE)
    # made before the compiled part, as where batches come from
    batch.layout.rows()
    batch.layout.tiles()
    return batch


def results(call, model, batch, rng):
    model.zero_grad()
    states = call(batch, rng)
    states.backward(torch.linspace(-1, 1, states.numel(), device=DEVICE).view_as(states))
    return [states.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("drops", [False, True])
def test_one_graph_serves_every_batch(drops):
    model = encoder_of()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed, lengths in enumerate(([20, 9, 3], [32, 1], [7, 7, 7, 7, 7])):
        batch = batch_of(lengths, seed)
        # the state on the device names the step: numbers would be one graph each
        state = torch.tensor([3, seed, 0], device=DEVICE)
        rng = Rng(3, exact=True, state=state) if drops else None
        ours, eager = (results(call, model, batch, rng) for call in (compiled, model))
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True)), lengths
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["recompiles"])
    assert not counters["graph_break"]
