"""How many kernels one encoder layer launches, vendor GEMMs included.

Counted where operators are dispatched: every PyTorch operator that writes memory is one kernel, and
every Triton launch is one. Triton launches are noted, not made, so that no GPU is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.config import EncoderConfig
from fastbert.encoder import Layer
from fastbert.kernels import launch, ops
from fastbert.kernels.ops import Rng
from fastbert.packing import Examples

MOST = {"forward": 8, "backward": 20}
HIDDEN, LENGTHS = 128, (20, 30)
# operators that make no kernel: they hand out memory, or look at it in another shape
QUIET = ("empty", "view", "reshape", "detach", "transpose", "unbind", "select", "slice", "alias",
         "new_empty", "expand", "unsqueeze", "permute", "as_strided", "t.", "split", "_unsafe_view",
         "is_same_size", "lift_fresh")  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts PyTorch operators that do work."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).removeprefix("aten.")
        if not name.startswith(QUIET):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def count(device: torch.device | str) -> dict[str, list[str]]:
    """The names of what a layer in training with dropout launches, by direction."""
    config = EncoderConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // 32,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=64,
    )
    layer = Layer(config).to(device)
    batch = Examples.from_lists([[1] * length for length in LENGTHS]).batch([0, 1]).to(device)
    # a batch is laid out before the step
    batch.layout.rows(), batch.layout.tiles()
    hidden_states = torch.randn(sum(LENGTHS), HIDDEN, device=device, requires_grad=True)
    rng = Rng(seed=1).on(device)
    found = {}
    with ops.use_backend("triton"):
        # the encoder draws for all layers at once
        heads = config.num_attention_heads
        rng = ops.with_attention_words(rng, sum(LENGTHS), heads, hidden_states.device)
        with launch.recording() as launches, Counted() as counted:
            output = layer(hidden_states, batch, rng, 1)
        found["forward"] = counted.names + [_name(call) for call in launches]
        flowing = torch.ones_like(output)
        with launch.recording() as launches, Counted() as counted:
            output.backward(flowing)
        found["backward"] = counted.names + [_name(call) for call in launches]
    return found


def line(found: dict[str, list[str]]) -> str:
    """One line for a table's head."""
    parts = [f"{len(names)} {way} (goal {MOST[way]})" for way, names in found.items()]
    return f"kernels a layer launches, GEMMs included: {', '.join(parts)}"


def _name(call: launch.Recorded) -> str:
    return str(call.kernel.fn.__name__)
