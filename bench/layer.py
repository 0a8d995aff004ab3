"""One encoder layer, forward and backward: ours on packed tokens, others on padded ones.

The hidden states' gradient and every weight's are taken. No dropout, and every row of the output is
wanted: what the whole model saves in its last layer is not counted here.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.bench.distributions import NAMED, lengths_of
from fastbert.bench.parity import Parity
from fastbert.bench.providers import BF16, COMPILER
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.timing import Step
from fastbert.bench.workload import layer_operations
from fastbert.config import EncoderConfig
from fastbert.encoder import Layer, initialise
from fastbert.packing import Examples, PackedBatch
from fastbert.training.loop import autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARITY_LENGTHS = (1, 7, 16, 33, 64)
# of each distribution, so that a step takes about as long
SEQUENCES = {"queries": 96, "sentences": 32, "wiki": 12}
Run = Callable[[Tensor], Tensor]


class Sides:
    """The same weights in three layers, for one set of lengths.

    Args:
        config: of the layer.
        lengths: of the sequences.
        device: that computes.
        kind: of the weights; fp64 for the oracle.
    """

    def __init__(
        self,
        config: EncoderConfig,
        lengths: np.ndarray,
        device: torch.device,
        kind: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.lengths = config, lengths
        self.device, self.kind = device, kind
        longest = int(lengths.max())
        real = torch.arange(longest) < torch.from_numpy(lengths)[:, None]
        self.real = real.to(device)
        self.batch = _batch(lengths, device)

    def states(self) -> Tensor:
        """[tokens, hidden_size], the same for all sides."""
        generator = torch.Generator().manual_seed(0)
        shape = (int(self.lengths.sum()), self.config.hidden_size)
        return torch.randn(shape, generator=generator).to(self.device, self.kind)

    def ours(self, *, compiled: bool = False) -> tuple[nn.Module, Run, Tensor]:
        """The layer, its call and its input."""
        layer = self._layer().to(self.device, self.kind)
        if compiled:
            layer.compile(dynamic=False)
        batch = self.batch
        return layer, lambda x: layer(x, batch, None, 1), self.states().requires_grad_()

    def transformers(self, *, compiled: bool = False) -> tuple[nn.Module, Run, Tensor]:
        """BertLayer with sdpa on padded states and a mask."""
        package = peers.transformers()
        config = self.config
        theirs = package.BertConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        layer = package.models.bert.modeling_bert.BertLayer(theirs)
        ours = self._layer()
        attention = layer.attention
        targets = (attention.self.query, attention.self.key, attention.self.value)
        with torch.no_grad():
            for number, target in enumerate(targets):
                target.weight.copy_(ours.qkv.weight.chunk(3)[number])
                target.bias.copy_(ours.qkv.bias.chunk(3)[number])
            for target, source in (
                (attention.output.dense, ours.attention_output),
                (attention.output.LayerNorm, ours.attention_norm),
                (layer.intermediate.dense, ours.intermediate),
                (layer.output.dense, ours.output),
                (layer.output.LayerNorm, ours.output_norm),
            ):
                target.weight.copy_(source.weight)
                target.bias.copy_(source.bias)
        layer = layer.to(self.device, self.kind)
        mask = self.real[:, None, None, :].expand(-1, 1, self.real.shape[1], -1)
        called = torch.compile(layer, dynamic=False) if compiled else layer

        def run(x: Tensor) -> Tensor:
            output = called(x, mask)
            return output[0] if isinstance(output, tuple) else output

        return layer, run, self._padded()

    def pytorch(self) -> tuple[nn.Module, Run, Tensor]:
        """nn.TransformerEncoderLayer on padded states and a mask of padding."""
        config, ours = self.config, self._layer()
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        with torch.no_grad():
            assert layer.self_attn.in_proj_weight is not None
            layer.self_attn.in_proj_weight.copy_(ours.qkv.weight)
            layer.self_attn.in_proj_bias.copy_(ours.qkv.bias)
            for target, source in (
                (layer.self_attn.out_proj, ours.attention_output),
                (layer.norm1, ours.attention_norm),
                (layer.linear1, ours.intermediate),
                (layer.linear2, ours.output),
                (layer.norm2, ours.output_norm),
            ):
                target.weight.copy_(source.weight)
                target.bias.copy_(source.bias)
        layer = layer.to(self.device, self.kind)
        padding = ~self.real
        return layer, lambda x: layer(x, src_key_padding_mask=padding), self._padded()

    def _layer(self) -> Layer:
        layer = Layer(self.config)
        initialise(layer, self.config, 0)
        return layer

    def _padded(self) -> Tensor:
        """[sequences, longest, hidden_size], zeros at padding."""
        shape = (*self.real.shape, self.config.hidden_size)
        padded = torch.zeros(shape, device=self.device, dtype=self.kind)
        padded[self.real] = self.states()
        return padded.requires_grad_()


def step(made: tuple[nn.Module, Run, Tensor], dtype: str) -> Step:
    """Forward and backward; gradients are dropped."""
    module, run, states = made
    device = states.device
    inputs = [states, *module.parameters()]
    flowing = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def take() -> None:
        with autocast(device, DTYPES[dtype]):
            output = run(states)
        torch.autograd.grad(output, inputs, flowing.to(output.dtype))

    return take


def parity(config: EncoderConfig, name: str, dtype: str, device: torch.device) -> Parity:
    """Output and input gradient at real tokens, beside transformers, against it in fp64."""
    lengths = np.asarray(PARITY_LENGTHS)
    judged = Parity(DTYPES[dtype])
    single, exact = (Sides(config, lengths, device, k) for k in (torch.float32, torch.float64))
    found = []
    for sides, side in ((single, name), (single, "transformers"), (exact, "transformers")):
        _, run, states = getattr(sides, side)()
        real = sides.real if states.ndim == 3 else slice(None)
        generator = torch.Generator().manual_seed(1)
        flowing = torch.zeros_like(states)
        shape = (int(lengths.sum()), config.hidden_size)
        flowing[real] = torch.randn(shape, generator=generator).to(states)
        compute = DTYPES[dtype] if states.dtype == torch.float32 else torch.float32
        with autocast(device, compute):
            output = run(states)
        (gradient,) = torch.autograd.grad(output, states, flowing.to(output.dtype))
        found.append({"output": output.detach()[real], "gradient": gradient[real]})
    judged.add(*found)
    return judged


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One size of layer over several distributions of lengths."""
    config = EncoderConfig.named(
        options.size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    chosen = [options.lengths] if options.lengths else list(SEQUENCES)
    for name in chosen[1:2] if options.quick and not options.lengths else chosen:
        sequences = options.sequences or SEQUENCES.get(name, 32)
        yield _case(config, options.size, name, sequences, device, compiled=options.compile)


def _case(
    config: EncoderConfig,
    size: str,
    name: str,
    sequences: int,
    device: torch.device,
    *,
    compiled: bool,
) -> Case:
    lengths = lengths_of(name, sequences)
    sides = Sides(config, lengths, device)
    makers: dict[str, tuple[Callable[[], tuple[nn.Module, Run, Tensor]], str, tuple[str, ...]]] = {
        OURS: (sides.ours, "ours", ("transformers",)),
        "transformers": (sides.transformers, "", ("transformers",)),
        "nn.TransformerEncoderLayer": (sides.pytorch, "pytorch", ("transformers",)),
    }
    if compiled:
        both = ("transformers", COMPILER)
        makers["fastbert, compiled"] = (
            functools.partial(sides.ours, compiled=True), "ours", both
        )  # fmt: skip
        makers["transformers, compiled"] = (
            functools.partial(sides.transformers, compiled=True), "", both
        )  # fmt: skip
    found = []
    for dtype in DTYPES:
        for provider, (make, judged, needs) in makers.items():
            check = functools.partial(parity, config, judged, dtype, device) if judged else None
            wanted = (*needs, *([BF16] if dtype == "bf16" else []))
            made = functools.partial(_made, make, dtype)
            found.append(Provider(provider, dtype, made, check, wanted))
    padded = sequences * int(lengths.max())
    work = Work(int(lengths.sum()), padded, 3 * layer_operations(config, lengths))
    conditions = {"size": size, "lengths": name, "sequences": sequences}
    return Case("layer", f"{size}, {sequences} x {name}", work, found, conditions)


def _made(make: Callable[[], tuple[nn.Module, Run, Tensor]], dtype: str) -> Step:
    return step(make(), dtype)


def _batch(lengths: np.ndarray, device: torch.device) -> PackedBatch:
    examples = Examples.from_lists([[1] * int(length) for length in lengths])
    batch = examples.batch(range(len(lengths))).to(device)
    # a batch is laid out once, for all layers
    batch.layout.rows()
    return batch


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="small", help="of the model (%(default)s)")
    parser.add_argument(
        "--lengths", help=f"{', '.join(NAMED)}, a number, or a text file ({', '.join(SEQUENCES)})"
    )
    parser.add_argument("--sequences", type=positive, help="a batch")
    parser.add_argument("--compile", action="store_true", help="torch.compile of both as well")


SUITE = Suite("layer", __doc__, cases, repeats=7, add_flags=_add_flags)
main = SUITE.main
