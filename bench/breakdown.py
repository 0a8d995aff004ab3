"""Where a training step's time goes, by kind of work: ours beside transformers.

Shares are torch's profiler's own account of time inside each operator; they are laid on the median
time of the step without the profiler, so that its cost does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastbert.bench import step_sides as sides
from fastbert.bench.providers import BF16
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite
from fastbert.bench.timing import Step
from fastbert.bench.workload import Workload, step_operations
from fastbert.models import BertForMaskedLM

REPEATS = 3
# operators, and on a GPU kernels, by what they do, the first that matches
KINDS = (
    ("optimiser", ("adam", "clip", "foreach", "norm.", "linalg_vector_norm", "_amp")),
    ("loss", ("log_softmax", "nll", "cross_entropy", "logsumexp")),
    ("attention", ("attention", "sdpa", "softmax", "flash")),
    ("matrix products", ("mm", "matmul", "linear", "mkldnn", "onednn", "dot", "nvjet")),
    ("GELU and norms", ("gelu", "layer_norm", "native_norm", "var_mean", "erf", "activation")),
    ("copies and casts", ("copy", "_to_", "::to", "contiguous", "clone", "cat", "fill", "zero",
                          "empty", "detach", "view", "transpose", "index", "embedding", "gather",
                          "scatter", "slice", "select", "resize", "memcpy", "memset")),
)  # fmt: skip
OTHER = "other"


def kind_of(operator: str) -> str:
    """What an operator does, by its name."""
    lower = operator.lower()
    return next((kind for kind, parts in KINDS if any(p in lower for p in parts)), OTHER)


def shares(step: Step, device: torch.device) -> dict[str, float]:
    """The share of each kind in one step's time on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        own = on_device_us(event) if device.type == "cuda" else event.self_cpu_time_total
        # what records, and the gaps between operators, is not the step's work
        if own and not event.key.startswith(("ProfilerStep", "[", "cuda")):
            kind = kind_of(event.key)
            spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    order = [*(kind for kind, _ in KINDS), OTHER]
    return {kind: spent[kind] / total for kind in order if spent.get(kind)}


def on_device_us(event: Any) -> float:
    """Microseconds of a kernel; none of what launched it, nor of a span that somebody named."""
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
    return float(event.self_device_time_total) if is_kernel and not event.is_user_annotation else 0


def spent_ms(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds by kind: shares of the median of a few steps."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    median = statistics.median(taken)
    return {kind: round(share * median, 2) for kind, share in shares(step, device).items()}


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The standard training step, a case a dtype."""
    workload = Workload()
    examples = workload.examples()
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM.from_config(workload.config(), seed=0).save_pretrained(folder)
        for dtype in ["bf16"] if options.quick else list(sides.DTYPES):
            needs = ("transformers", *([BF16] if dtype == "bf16" else []))
            judge = sides.Judge(workload, folder, dtype, device, batches=2)
            parts = (folder, examples, dtype, device)
            made = {
                OURS: functools.lru_cache(sides.ours(*parts)),
                "transformers": functools.lru_cache(sides.padded(*parts)),
            }
            found = [
                Provider(
                    name,
                    dtype,
                    make,
                    judge.ours if name == OURS else None,
                    needs,
                    figures=functools.partial(_figures, make, device),
                )
                for name, make in made.items()
            ]
            lengths, masked = examples.lengths, int(examples.num_masked.sum())
            padded = len(examples) * int(lengths.max())
            operations = step_operations(workload.config(), lengths, masked)
            work = Work(int(lengths.sum()), padded, operations)
            name = f"{workload.size}, {workload.sequences} x {workload.lengths}, {dtype}"
            yield Case("breakdown", name, work, found, dataclasses.asdict(workload))


def _figures(make: sides.Make, device: torch.device) -> dict[str, float]:
    return spent_ms(make(), device)


SUITE = Suite("breakdown", __doc__, cases, repeats=3, warm_up=1)
main = SUITE.main
