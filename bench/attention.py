"""`fastbert bench attention`: attention beside its peers, over uniform and mixed lengths.

Useful FLOPs only: sums of squared lengths. A row whose parity check fails is refused; a peer that
cannot run is named with the reason. Without a GPU the parity runs on small batches, the number of
kernels a layer launches is counted, under Triton's interpreter in a process of its own, and the
reference path is timed on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import attention_cpu, attention_peers, gpu, layer_kernels, machine
from fastbert.bench.attention_peers import Batch, Prepared
from fastbert.bench.attention_steps import (
    DTYPE,
    HEAD_DIM,
    HEADS,
    batch_of,
    distributions,
    flowing,
    ours,
    step_of,
)
from fastbert.bench.machine import file_name
from fastbert.bench.parity import Parity
from fastbert.files import atomic_write
from fastbert.kernels import ops

TOKENS = 16384
DROPOUT = 0.1
PARITY_TOKENS = 1031
CPU_TOKENS = 150
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


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every row was measured, 1 where one was refused."""
    options = _parser().parse_args(arguments)
    if options.count:
        print(json.dumps(layer_kernels.count("cpu")))
        return 0
    if not torch.cuda.is_available():
        return _static(options.results)
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
        name = file_name(torch.cuda.get_device_name())
        _write(options.results, name, machine.describe(device), counted, rows)
    return 1 if any(row.refused for row in rows) else 0


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
        "ours": ours(0.0),
        "ours, dropout": ours(DROPOUT),
        **attention_peers.PEERS,
    }
    for provider, prepare in providers.items():
        try:
            row.ms[provider] = gpu.time_ms(step_of(prepare, batch, forward_only))
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
        call, (leaf,) = ours(0.0)(Batch(batch.qkv.to(dtype), lengths, batch.layout))
        with ops.use_backend(backend):
            output = call()
        (gradient,) = torch.autograd.grad(output, leaf, flowing(output))
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


def _static(results: str | None) -> int:
    print("no GPU: attention's speed needs one; what follows holds without it")
    # the interpreter takes the compiler's place when triton is imported, and stays there
    command = [sys.executable, "-m", "fastbert.bench", "attention", "--count"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("FASTBERT_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    counted = None
    if done.returncode:
        print((done.stderr.strip().splitlines() or ["kernels of a layer: not counted"])[-1])
    else:
        counted = json.loads(done.stdout)
        print(layer_kernels.line(counted))
    refused = 0
    device = torch.device("cpu")
    for name, lengths in distributions(TOKENS):
        judged = parity(name, CPU_TOKENS, device)
        refused += bool(judged.failures())
        useful = 4 * HEADS * HEAD_DIM * sum(n * n for n in lengths) / 1e9
        print(f"{name:<16} {useful:>8.1f} GFLOP forward  reference's parity {judged.worst():.2f}")
    lengths_of = dict(distributions(attention_cpu.TOKENS))
    rows = []
    for row in attention_cpu.rows({n: lengths_of[n] for n in attention_cpu.LENGTHS}):
        rows.append(row)
        refused += row.refused
        print(row.line(), flush=True)
    print(f"peers on a GPU: {', '.join(attention_peers.PEERS)}")
    if results:
        described = machine.describe(device)
        _write(results, f"cpu-{described['cpu_class']}", described, counted, rows)
    return 1 if refused else 0


def _write(
    folder: str,
    name: str,
    described: dict[str, Any],
    counted: dict[str, list[str]] | None,
    rows: Sequence[Row | attention_cpu.Row],
) -> None:
    path = Path(folder) / f"attention-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "machine": described,
        "layer_kernels": counted,
        "rows": [asdict(row) for row in rows],
    }
    with atomic_write(path) as file:
        json.dump(entry, file, indent=1)
        file.write("\n")
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert bench attention", description=__doc__)
    parser.add_argument("--results", help="folder for one JSON file a device")
    parser.add_argument("--count", action="store_true", help="a layer's kernels, as JSON")
    return parser
