"""Memory that a layer keeps for its backward pass, beside transformers' layer."""

from __future__ import annotations

import pytest
import torch
from kernel_harness import DEVICE, runs_kernels

from fastbert.bench import __main__ as bench
from fastbert.bench import activations
from fastbert.config import EncoderConfig

pytest.importorskip("transformers", reason="transformers comes with the test extra")
pytestmark = runs_kernels

# heads of 32, the smallest that kernels take
HIDDEN, INTERMEDIATE, HEADS = 96, 384, 3


@pytest.fixture(scope="module")
def found():
    config = EncoderConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
    )
    return activations.measure(config, torch.device(DEVICE))


def test_a_layer_keeps_what_the_design_says(found):
    # input, query, key and value, context, its projection, the norm of it, the feed-forward's
    # pre-activation and output, all bf16
    matrices = 2 * (HIDDEN * (1 + 3 + 1 + 1 + 1 + 1) + INTERMEDIATE)
    # four statistics of two norms, and attention's probabilities or their log-sum-exp
    rest = 4 * 4 + max(2 * HEADS * activations.LENGTH, 4 * HEADS)
    assert matrices <= found["fastbert"] <= matrices + rest


def test_the_goals(found):
    for name, goal in activations.GOALS.items():
        assert found[name] <= goal * found["transformers"], found


def test_recomputation_keeps_the_input_alone(found):
    assert found["fastbert, recomputing"] == 2 * HIDDEN


def test_each_piece_of_memory_counts_once():
    weight = torch.ones(3, 5, requires_grad=True)
    x = torch.ones(7, 3, requires_grad=True)

    def call():
        hidden = x @ weight
        return hidden * hidden + hidden[:2].sum()

    # x and the product, and no parameter
    assert activations.saved_bytes(call, [weight]) == 4 * (7 * 3 + 7 * 5)


def test_the_command(monkeypatch, capsys):
    found = {"transformers": 100.0, "fastbert": 50.0, "fastbert, recomputing": 41.0}
    monkeypatch.setattr(activations, "measure", lambda *_: found)
    assert bench.main(["activations"]) == 1
    assert "0.41  0.4" in capsys.readouterr().out
