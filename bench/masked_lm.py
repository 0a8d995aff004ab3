"""`fastbert bench masked-lm`: the masked-LM loss beside its peers, time and peak memory.

Hidden states, a vocabulary's weight and bias in, loss and all three gradients out. On a GPU
products are made in bf16 from fp32 parameters, as in training under autocast, at the two sizes of
BERT-base and BERT-large; on a CPU in fp32 and fewer rows. Who fails the parity check is refused.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.bench import machine
from fastbert.bench.machine import file_name
from fastbert.bench.memory import step_mib
from fastbert.bench.parity import Parity
from fastbert.bench.providers import installed
from fastbert.bench.timing import interleaved_ms, spread
from fastbert.files import atomic_write
from fastbert.kernels import ops

# rows, hidden size, vocabulary: 15 % of 16,384 tokens of BERT-base, and 16k rows of BERT-large
GPU_SHAPES = ((2458, 768, 30522), (16384, 1024, 30522))
CPU_SHAPES = ((615, 256, 8192), (615, 768, 30522))
PARITY_ROWS = 257
# 15 % of rows without a target, as slots that a batch leaves free
UNUSED = 0.15
OURS = "fastbert"

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One provider at one shape; `extra_mib` is what one call holds beyond inputs and gradients."""

    provider: str
    shape: tuple[int, ...]
    parity: float
    refused: str = ""
    ms: float = 0.0
    lowest_ms: float = 0.0
    highest_ms: float = 0.0
    extra_mib: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where ours was measured at every shape, 1 where it was refused."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = False
    described = machine.describe(device)
    name = described.get("gpu") or described["cpu"]
    print(f"{name}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}", flush=True)
    rows: list[Row] = []
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        rows += measure(shape, device, dtype, options.repeats)
    print(table(rows))
    if options.results:
        path = Path(options.results) / f"masked-lm-{file_name(name)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump({"machine": described, "rows": [asdict(row) for row in rows]}, file, indent=1)
        print(path)
    return 1 if any(row.refused for row in rows if row.provider == OURS) else 0


def measure(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """Parity first; then times in turn, and peaks one by one."""
    rows, steps, shares = [], {}, {}
    tensors, labels = _inputs(shape, device, dtype)
    for provider, loss in providers(device).items():
        try:
            judged = parity(loss, shape, device, dtype)
            step = functools.partial(_gradients, loss, tensors, labels)
            step()
        except (RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
            # peers have limits of their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            rows.append(Row(provider, shape, 0.0, refused=reason[:100]))
            continue
        shares[provider] = judged.worst()
        if judged.failures():
            rows.append(Row(provider, shape, judged.worst(), refused="outside the error rule"))
            continue
        steps[provider] = step
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    times = interleaved_ms(steps, repeats=repeats, synchronise=wait)
    for provider, step in steps.items():
        taken = spread(times[provider])
        extra = _extra_mib(step, device)
        rows.append(
            Row(
                provider,
                shape,
                shares[provider],
                ms=taken.median,
                lowest_ms=taken.lowest,
                highest_ms=taken.highest,
                extra_mib=extra,
            )
        )
    return rows


def providers(device: torch.device) -> dict[str, Loss]:
    """Ours, and whoever is installed and knows this device."""
    found: dict[str, Loss] = {OURS: _ours, "eager": _eager}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = _chunked
    if device.type != "cuda":
        return found
    found["compiled"] = torch.compile(_eager)
    for provider, loss, package in (
        ("liger", _liger, "liger_kernel"),
        ("cut-cross-entropy", _cut, "cut_cross_entropy"),
    ):
        if installed(package):
            found[provider] = loss
    return found


def table(rows: Sequence[Row]) -> str:
    """Times, memory, and how many times slower and larger than ours each peer is."""
    lines = [
        f"{'provider':<22} {'rows x width x vocabulary':<26} {'ms':>9} {'lowest':>9} "
        f"{'highest':>9} {'x ours':>7} {'extra MiB':>10} {'x ours':>7} {'of bound':>8}"
    ]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        if row.refused:
            lines.append(f"{row.provider:<22} {shape:<26} refused: {row.refused}")
            continue
        ours = next((r for r in rows if r.provider == OURS and r.shape == row.shape), row)
        ratio = f"{row.extra_mib / ours.extra_mib:.2f}" if ours.extra_mib else "-"
        lines.append(
            f"{row.provider:<22} {shape:<26} {row.ms:>9.3f} {row.lowest_ms:>9.3f} "
            f"{row.highest_ms:>9.3f} {row.ms / (ours.ms or row.ms):>7.2f} {row.extra_mib:>10.1f} "
            f"{ratio:>7} {row.parity:>8.2f}"
        )
    return "\n".join(lines)


def _ours(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return ops.linear_cross_entropy(hidden, weight, labels, bias).loss_sum


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum")


def _chunked(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    # whose annotation says less than its documentation
    chunked: Any = F.linear_cross_entropy
    loss: Tensor = chunked(
        hidden,
        weight.to(hidden.dtype),
        labels,
        linear_bias=bias.to(hidden.dtype),
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return loss


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden,
        weight.to(hidden.dtype),
        labels,
        bias=bias.to(hidden.dtype),
        ignore_index=-100,
        reduction="sum",
    )
    return loss


def _cut(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    loss: Tensor = linear_cross_entropy(
        hidden, weight.to(hidden.dtype), labels, bias=bias.to(hidden.dtype), reduction="sum"
    )
    return loss


def step(
    loss: Loss, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[Tensor, ...]]:
    """One call with all three gradients, on inputs of its own."""
    tensors, labels = _inputs(shape, device, dtype)
    return functools.partial(_gradients, loss, tensors, labels)


def _gradients(loss: Loss, tensors: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, ...]:
    hidden, weight, bias = tensors
    return torch.autograd.grad(loss(hidden, weight, bias, labels), [hidden, weight, bias])


def _inputs(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    rows, width, vocab_size = shape
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(rows, width, generator=generator).to(device, dtype),
        (torch.randn(vocab_size, width, generator=generator) * width**-0.5).to(device),
        torch.randn(vocab_size, generator=generator).to(device),
    ]
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < UNUSED] = -100
    return [tensor.requires_grad_() for tensor in drawn], labels.to(device)


def parity(
    loss: Loss, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Parity:
    """The provider against PyTorch in the same dtype and in fp64, on fewer rows."""
    tensors, labels = _inputs((PARITY_ROWS, *shape[1:]), device, dtype)
    results = []
    exact = [t.detach().double().requires_grad_() for t in tensors]
    for operator, inputs in ((loss, tensors), (_eager, tensors), (_eager, exact)):
        hidden, weight, bias = inputs
        value = operator(hidden, weight, bias, labels)
        gradients = torch.autograd.grad(value, inputs)
        names = ("hidden", "weight", "bias")
        results.append({"loss": value.detach(), **dict(zip(names, gradients, strict=True))})
    judged = Parity(dtype)
    judged.add(*results)
    return judged


def _extra_mib(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> float:
    results = sum(t.numel() * t.element_size() for t in step()) / 2**20
    return step_mib(step, device) - results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert bench masked-lm", description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count (%(default)s)")
    parser.add_argument("--results", help="folder for one JSON file a device")
    return parser
