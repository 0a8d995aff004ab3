"""`fastbert bench attention`: attention beside its peers, over uniform and mixed lengths.

Useful FLOPs only: sums of squared lengths. A row whose parity check fails is refused; a peer that
cannot run is named with the reason. Without a GPU the parity runs on small batches, and the number
of kernels a layer launches is counted, under Triton's interpreter in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench import attention_peers, gpu, layer_kernels, machine
from fastbert.bench.attention_peers import Batch, Prepared
from fastbert.bench.kernels import file_name
from fastbert.bench.parity import Parity
from fastbert.bench.timing import interleaved_ms, speedup
from fastbert.files import atomic_write
from fastbert.kernels import ops
from fastbert.kernels.layout import Layout
from fastbert.kernels.ops import Rng

DTYPE = torch.bfloat16
TOKENS, HEADS, HEAD_DIM = 16384, 12, 64
UNIFORM = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DROPOUT = 0.1
PARITY_TOKENS = 1031
CPU_TOKENS = 150
CPU_TIMING_TOKENS, CPU_REPEATS = 4096, 5
# no row is begun later than this, so that all ends within nine minutes
LIMIT_S = 480


@dataclass
class Row:
    """Milliseconds by provider; `skipped` says why a peer has none."""

    lengths: str
    direction: str
    parity: float
    refused: bool
    tflop: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def distributions(tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Names and lengths: uniform ones, and two mixtures that BERT meets."""
    for length in UNIFORM:
        if length <= tokens:
            yield str(length), [length] * (tokens // length)
    generator = np.random.default_rng(0)
    # log-normal about a mean of 45, as sentences are
    yield "16 to 128", _filled(tokens, lambda: generator.lognormal(np.log(36.0), 0.7), 16, 128)
    yield "32 to 512", _filled(tokens, lambda: generator.lognormal(np.log(128.0), 0.8), 32, 512)
    long = min(8192, tokens // 2)
    yield f"{long} and ones", [long, *[1] * min(256, tokens - long)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every row was measured, 1 where one was refused."""
    options = _parser().parse_args(arguments)
    if options.count:
        print(json.dumps(layer_kernels.count("cpu")))
        return 0
    if not torch.cuda.is_available():
        return _static()
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    counted = layer_kernels.count(device)
    print(layer_kernels.line(counted))
    rows: list[Row] = []
    started = time.monotonic()
    for name, lengths in distributions(TOKENS):
        batch = batch_of(lengths, TOKENS, device)
        for direction in ("forward", "forward + backward"):
            if time.monotonic() - started > LIMIT_S:
                print(f"{name}, {direction}: not begun, the time is up")
                continue
            rows.append(measure(name, batch, direction == "forward"))
            print(line(rows[-1]), flush=True)
    if options.results:
        path = Path(options.results) / f"attention-{file_name(torch.cuda.get_device_name())}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "machine": machine.describe(device),
            "layer_kernels": counted,
            "rows": [asdict(row) for row in rows],
        }
        with atomic_write(path) as file:
            json.dump(entry, file, indent=1)
        print(path)
    return 1 if any(row.refused for row in rows) else 0


def batch_of(lengths: list[int], capacity: int, device: torch.device) -> Batch:
    """Random projections for the lengths, the rest of the capacity a tail."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(bounds, capacity, max(lengths)).to(device)
    qkv = torch.randn(capacity, 3, HEADS, HEAD_DIM, generator=generator).to(device, DTYPE)
    return Batch(qkv, lengths, layout)


def measure(name: str, batch: Batch, forward_only: bool) -> Row:
    """Parity first; then ourselves and every peer that can run."""
    direction = "forward" if forward_only else "forward + backward"
    judged = parity(name, PARITY_TOKENS, batch.qkv.device)
    products = 4 if forward_only else 14
    tflop = products * HEADS * HEAD_DIM * sum(n * n for n in batch.lengths) / 1e12
    row = Row(name, direction, judged.worst(), bool(judged.failures()), tflop)
    if row.refused:
        return row
    providers: dict[str, Callable[[Batch], Prepared]] = {
        "ours": _ours(0.0),
        "ours, dropout": _ours(DROPOUT),
        **attention_peers.PEERS,
    }
    for provider, prepare in providers.items():
        try:
            row.ms[provider] = gpu.time_ms(_step(prepare, batch, forward_only))
        except Exception as error:  # a peer may refuse in any words: they go into the row
            row.skipped[provider] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "ours" in row.skipped:
            break
    if forward_only:
        row.ms.update(attention_peers.mask_construction_ms(batch))
    return row


def parity(name: str, tokens: int, device: torch.device) -> Parity:
    """The same mixture at a size that fp64 takes quickly, by the error rule."""
    lengths = dict(distributions(tokens)).get(name) or [tokens]
    batch = batch_of(lengths, tokens, device)
    judged = Parity(DTYPE)
    results = []
    runs = (("triton", DTYPE), ("reference", DTYPE), ("reference", torch.float64))
    for backend, dtype in runs:
        if device.type == "cpu":
            backend = "reference"
        call, (leaf,) = _ours(0.0)(Batch(batch.qkv.to(dtype), lengths, batch.layout))
        with ops.use_backend(backend):
            output = call()
        (gradient,) = torch.autograd.grad(output, leaf, _flowing(output))
        results.append({"output": output.detach(), "gradient": gradient})
    judged.add(*results)
    return judged


def line(row: Row) -> str:
    """One row: our time and rate, then each provider's time over ours."""
    label = f"{row.lengths:<16} {row.direction:<19}"
    if row.refused:
        return f"{label} refused: {row.parity:.2f} of the error bound"
    if "ours" not in row.ms:
        return f"{label} does not run: {row.skipped['ours']}"
    ours = row.ms["ours"]
    ratios = "  ".join(f"{n} {t / ours:.2f}" for n, t in row.ms.items() if n != "ours")
    missing = "".join(f"\n    {n}: skipped, {why}" for n, why in row.skipped.items())
    return f"{label} {ours:>8.4f} ms {1e3 * row.tflop / ours:>6.1f} TFLOP/s  {ratios}{missing}"


def grouping(lengths: list[int]) -> str:
    """The reference path on this CPU, fp32: sequences grouped by length beside a loop over them."""
    packed = batch_of(lengths, sum(lengths), torch.device("cpu"))
    batch = Batch(packed.qkv.float(), lengths, packed.layout)
    with ops.use_backend("reference"):
        steps = {
            name: _step(prepare, batch, forward_only=False)
            for name, prepare in (("grouped", _ours(0.0)), ("loop", attention_peers.loop))
        }
        times = interleaved_ms(steps, repeats=CPU_REPEATS)
    ratio = speedup(times["loop"], times["grouped"])
    return (
        f"forward + backward on this CPU: {ratio.median:.2f} times as fast as a loop over "
        f"{len(lengths)} sequences ({ratio.lowest:.2f} to {ratio.highest:.2f})"
    )


def _ours(dropout_p: float) -> Callable[[Batch], Prepared]:
    def prepare(batch: Batch) -> Prepared:
        leaf = batch.qkv.detach().requires_grad_()
        rng = Rng(seed=1, exact=True).on(leaf.device)
        options: dict[str, Any] = {"layout": batch.layout, "dropout_p": dropout_p, "rng": rng}
        bounds = batch.layout.cu_seqlens
        return lambda: ops.fused_qkv_attention(leaf, bounds, **options), [leaf]

    return prepare


def _step(
    prepare: Callable[[Batch], Prepared], batch: Batch, forward_only: bool
) -> Callable[[], Any]:
    call, leaves = prepare(batch)

    def forward() -> Any:
        with torch.no_grad():
            return call()

    if forward_only:
        return forward
    flowing = _flowing(call())
    return lambda: torch.autograd.grad(call(), leaves, flowing)


def _flowing(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(DTYPE).to(output)


def _static() -> int:
    print("no GPU: attention's speed needs one; what follows holds without it")
    # the interpreter takes the compiler's place when triton is imported, and stays there
    command = [sys.executable, "-m", "fastbert.bench", "attention", "--count"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("FASTBERT_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print((done.stderr.strip().splitlines() or ["kernels of a layer: not counted"])[-1])
    else:
        print(layer_kernels.line(json.loads(done.stdout)))
    refused = 0
    device = torch.device("cpu")
    for name, lengths in distributions(TOKENS):
        judged = parity(name, CPU_TOKENS, device)
        refused += bool(judged.failures())
        useful = 4 * HEADS * HEAD_DIM * sum(n * n for n in lengths) / 1e9
        print(f"{name:<16} {useful:>8.1f} GFLOP forward  reference's parity {judged.worst():.2f}")
    for name, lengths in distributions(CPU_TIMING_TOKENS):
        if " to " in name:
            print(f"{name:<16} {grouping(lengths)}", flush=True)
    print(f"peers on a GPU: {', '.join(attention_peers.PEERS)}")
    return 1 if refused else 0


def _filled(tokens: int, draw: Callable[[], float], least: int, most: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(min(max(draw(), least), most)))
    lengths[-1] -= sum(lengths) - tokens
    return lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert bench attention", description=__doc__)
    parser.add_argument("--results", help="folder for one JSON file a device")
    parser.add_argument("--count", action="store_true", help="a layer's kernels, as JSON")
    return parser
