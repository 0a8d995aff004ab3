"""`activations`: bytes that one encoder layer keeps for its backward pass, a token.

Counted by hooks on saved tensors, parameters left out, as the difference between two token counts,
so that what does not grow with the tokens (weights in bf16) does not count. fp32 weights, bf16
autocast, dropout 0.1; transformers with sdpa and without padding, its attention dropout off, since
on a CPU sdpa would otherwise keep the probabilities that it does not keep on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.packing import Examples

# tokens a sequence: short ones, so that probabilities, where a path keeps them, weigh little
LENGTH = 16
GOALS = {"fastbert": 0.6, "fastbert, recomputing": 0.4}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where both goals are met, 1 otherwise."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = EncoderConfig.named(options.size, vocab_size=1000, num_hidden_layers=2)
    found = measure(config, device)
    if options.json:
        print(json.dumps(found))
        return 0
    print(ops.describe(device))
    print(f"{'program':<24} {'bytes a token and layer':>24} {'share':>6}  goal")
    for name, count in found.items():
        share = count / found["transformers"]
        print(f"{name:<24} {count:>24,.0f} {share:>6.2f}  {GOALS.get(name, '')}")
    return 0 if all(found[n] <= goal * found["transformers"] for n, goal in GOALS.items()) else 1


def measure(config: EncoderConfig, device: torch.device) -> dict[str, float]:
    """Bytes a token and layer by program; `config` has at least two layers."""
    found = {"transformers": _growth(lambda n: _theirs(config, n, device))}
    for name, recompute in (("fastbert", False), ("fastbert, recomputing", True)):

        def ours(sequences: int, recompute: bool = recompute) -> int:
            return _ours(config, sequences, device, recompute=recompute)

        found[name] = _growth(ours)
    return found


def saved_bytes(call: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes of the memory that `call` keeps for backward, each piece once, parameters left out."""
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def _growth(count: Callable[[int], int]) -> float:
    few, many = 2, 6
    return (count(many) - count(few)) / ((many - few) * LENGTH)


def _ours(config: EncoderConfig, sequences: int, device: torch.device, *, recompute: bool) -> int:
    encoder = Encoder(config).to(device)
    encoder.recompute = recompute
    examples = Examples.from_lists([[7] * LENGTH] * sequences)
    batch = examples.batch(range(sequences)).to(device)
    batch.layout.rows()
    states = torch.randn(batch.capacity, config.hidden_size, device=device, requires_grad=True)
    # a layer in the middle gets and gives the dtype of autocast
    inner = states.bfloat16()
    rng = Rng(1, exact=True).on(device)

    def layer() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if recompute:
                return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
                    encoder.layers[0], inner, batch, rng, 1, use_reentrant=False
                )
            return encoder.layers[0](inner, batch, rng, 1)  # type: ignore[no-any-return]

    return saved_bytes(layer, list(encoder.parameters()))


def _theirs(config: EncoderConfig, sequences: int, device: torch.device) -> int:
    package = peers.transformers()
    theirs = package.BertConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    layer: nn.Module = package.models.bert.modeling_bert.BertLayer(theirs).to(device).train()
    states = torch.randn(sequences, LENGTH, config.hidden_size, device=device, requires_grad=True)
    # its norms give fp32 under autocast, so that is what a layer in the middle gets; no leaf, of
    # which autocast would keep one copy in bf16 for all three projections
    inner = states * 1.0

    def call() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return layer(inner)

    return saved_bytes(call, list(layer.parameters()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert.bench activations", description=__doc__)
    parser.add_argument("--size", default="base", help="of the model (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the figures alone, as JSON")
    return parser
