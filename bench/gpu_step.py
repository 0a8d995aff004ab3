"""`gpu-step`: one pre-training step of BERT-base and BERT-large on a GPU, and where its time goes.

Packed batches of varying content, wiki-like lengths, dropout, 15 % masked, bf16; ours eager and as
a captured CUDA graph, our reference path, and transformers (sdpa, padded, eager and compiled).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import gpu, machine, peers
from fastbert.bench.breakdown import on_device_us
from fastbert.bench.machine import file_name
from fastbert.bench.step_sides import BETAS, CLIP_NORM, EPS, LEARNING_RATE, WEIGHT_DECAY
from fastbert.bench.timing import interleaved_ms, spread
from fastbert.bench.workload import Workload, part_of, step_operations
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.models import BertForMaskedLM
from fastbert.packing import Capacity, Examples, PackedBatch, best_fit
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import WARM_STEPS, CapturedStep, TrainingStep

TOKEN_BUDGET = 16384
BATCHES = 4
DROPOUT = 0.1
DTYPE = torch.bfloat16
# of an H100 (SXM), dense bf16: what the goals are shares of
PEAK_TFLOP_PER_S = 989.0
# real tokens a second on an H100: first step and aim
GOALS = {"base": (776_000, 1_000_000), "large": (228_000, 280_000)}
# how many times transformers padded, and the best alternative in torch alone that packs
GOAL_RATIOS = {"transformers": 2.5, "fastbert, reference": 1.3}
WIKI = Workload(size="base", sequences=340, lengths="articles")
PEER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)
# kernels by what they do, the first that matches; in lower case
KINDS = (
    ("attention", ("attention", "flash", "fmha", "softmax")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "wgmma", "cublas", "splitk")),
    ("norm", ("layer_norm", "layernorm")),
    ("activation", ("bias_activation", "gelu")),
    ("head", ("cross_entropy", "bias_gradient", "gather_rows", "scatter_rows")),
    ("embedding", ("embedding", "run_sums", "join_runs", "sort")),
    ("embedding", ("indexselect", "index_select", "indexing")),
    ("optimiser", ("adam", "multi_tensor", "foreach", "norm_kernel", "lpnorm")),
    ("sums", ("column_sum", "reduce")),
    ("copies and casts", ("copy", "memcpy", "memset", "fill", "cat", "elementwise")),
)


@dataclass
class Row:
    """One program's step.

    Attributes:
        step_ms: median; `lowest_ms`, `highest_ms` of the rounds.
        real_tokens_per_s: padding and tail do not count.
        mfu: share of the card's bf16 peak, attention counted as the sum of squared lengths.
        peak_gib: most memory during a step.
        failed: why there are no figures.
    """

    size: str
    name: str
    step_ms: float = 0.0
    lowest_ms: float = 0.0
    highest_ms: float = 0.0
    real_tokens_per_s: float = 0.0
    mfu: float = 0.0
    peak_gib: float = 0.0
    failed: str = ""


@dataclass
class Size:
    """What was measured of one model size."""

    size: str
    parameters: int
    fill: float
    rows: list[Row] = field(default_factory=list)
    # milliseconds a step of our fastest, by kind and by kernel
    kinds_ms: dict[str, float] = field(default_factory=dict)
    kernels_ms: dict[str, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where our step was measured for every size, 1 otherwise."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("gpu-step: needs a CUDA or HIP device, torch sees none")
    name = torch.cuda.get_device_name()
    deadline = time.monotonic() + options.seconds
    cases = {size: _Case(size) for size in options.sizes}
    # ours of every size first: what the time runs out for is a peer
    for program, size in itertools.product(PROGRAMS, cases):
        measure(cases[size], program, options.rounds, deadline)
        if options.results:
            found = [case.found for case in cases.values()]
            _write(Path(options.results) / f"steps-{file_name(name)}.json", found)
    print(f"{name}, torch {torch.__version__}, bf16, {TOKEN_BUDGET:,} tokens a step")
    for case in cases.values():
        print(table(case.found))
    ours = [row for case in cases.values() for row in case.found.rows if row.name == "fastbert"]
    return 1 if any(row.failed for row in ours) else 0


class _Case:
    """A model size, its batches, and what was found."""

    def __init__(self, size: str) -> None:
        self.config = EncoderConfig.named(
            size,
            vocab_size=WIKI.vocab_size,
            max_position_embeddings=WIKI.longest,
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
        )
        self.examples = WIKI.examples()
        self.batches, self.chosen = _batches(self.examples)
        self.tokens = sum(batch.num_tokens for batch in self.batches) / len(self.batches)
        per_batch = [
            step_operations(
                self.config, self.examples.lengths[part], self.examples.num_masked[part].sum()
            )
            for part in self.chosen
        ]
        self.operations = float(np.mean(per_batch))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in BertForMaskedLM(self.config).parameters())
        self.found = Size(size, parameters, self.tokens / TOKEN_BUDGET)


def measure(case: _Case, program: str, rounds: int, deadline: float) -> None:
    """Time one program; one that would be begun after the deadline is left out, ours apart."""
    row = Row(case.found.size, program)
    case.found.rows.append(row)
    if time.monotonic() > deadline and program != "fastbert":
        row.failed = "the time was up"
        return
    try:
        _time(row, PROGRAMS[program](case), rounds, case)
    except Exception as error:  # a program that breaks is told, and costs no other row
        row.failed = (str(error).strip().splitlines() or [type(error).__name__])[0]
    # a model that lies in a cycle would leave the next one less room
    gc.collect()
    torch.cuda.empty_cache()
    print(f"measured {row.size}, {program}", flush=True)


def table(found: Size) -> str:
    """Rows with the goals beside, then where the time of our fastest step goes."""
    goal, aim = GOALS.get(found.size, (0, 0))
    lines = [
        f"BERT-{found.size}, {found.parameters / 1e6:.0f} M parameters, batches "
        f"{found.fill:.1%} full; goal {goal:,} real tokens/s, then {aim:,}",
        f"{'program':<26} {'ms':>8} {'tokens/s':>10} {'MFU':>6} {'GiB':>6}  ours is faster by",
    ]
    ours = [r for r in found.rows if r.name in ("fastbert", "fastbert, captured") and not r.failed]
    best = min(ours, key=lambda row: row.step_ms, default=None)
    for row in found.rows:
        if row.failed:
            lines.append(f"{row.name:<26} {row.failed}")
            continue
        ratio = ""
        if best is not None and row not in ours:
            # steps of padded batches hold the same sequences
            ratio = f"{best.real_tokens_per_s / row.real_tokens_per_s:.2f}"
            wanted = GOAL_RATIOS.get(row.name)
            ratio += f" (goal {wanted})" if wanted else ""
        lines.append(
            f"{row.name:<26} {row.step_ms:>8.2f} {row.real_tokens_per_s:>10,.0f} {row.mfu:>6.1%} "
            f"{row.peak_gib:>6.1f}  {ratio}"
        )
    total = sum(found.kinds_ms.values()) or 1.0
    lines += [
        f"  {kind:<24} {ms:>8.2f} ms {ms / total:>6.1%}" for kind, ms in found.kinds_ms.items()
    ]
    lines += [f"    {ms:>8.3f} ms  {name[:80]}" for name, ms in found.kernels_ms.items()]
    return "\n".join(lines)


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS if any(p in lower for p in parts)), "other")


def _batches(examples: Examples) -> tuple[list[PackedBatch], list[list[int]]]:
    slots = TOKEN_BUDGET // 16
    dealt = best_fit(examples.lengths, TOKEN_BUDGET, slots)[:BATCHES]
    masked = int(TOKEN_BUDGET * WIKI.mask_probability) + slots
    batches = []
    for chosen in dealt:
        batch = examples.batch(chosen, Capacity(TOKEN_BUDGET, slots, masked))
        batch.max_seqlen = WIKI.longest
        batches.append(batch)
    return batches, dealt


def _ours(
    case: _Case, *, captured: bool = False, backend: str = "triton"
) -> Iterator[Callable[[], Tensor]]:
    # made on the device: drawing the weights of BERT-large on the host takes longer than the rest
    with torch.device("cuda"):
        model = BertForMaskedLM(case.config).train()
    optimizers = Optimizers(
        model, "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=BETAS[1]
    )
    eager = TrainingStep(model, optimizers, DTYPE, CLIP_NORM)
    step = CapturedStep(eager) if captured else eager
    numbers = itertools.count()
    for batch in itertools.cycle(case.batches):

        def take(batch: PackedBatch = batch) -> Tensor:
            with ops.use_backend(backend):
                # a batch object of its own, so that its layout is worked out as for a fresh batch
                result = step([dataclasses.replace(batch)], Rng(1, next(numbers)), 1.0)
            return result.sums["masked_lm_loss"]

        yield take


def _theirs(case: _Case, *, compiled: bool = False) -> Iterator[Callable[[], Tensor]]:
    package = peers.transformers()
    sizes = {name: getattr(case.config, name) for name in PEER_FIELDS}
    with torch.device("cuda"):
        model = package.BertForMaskedLM(
            package.BertConfig(**sizes, attn_implementation="sdpa")
        ).train()
    called: Any = torch.compile(model, dynamic=True) if compiled else model
    groups = peers.parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    device = torch.device("cuda")
    padded = [peers.padded(part_of(case.examples, part), device) for part in case.chosen]
    for batch in itertools.cycle(padded):

        def take(batch: dict[str, Any] = batch) -> Tensor:
            with torch.autocast("cuda", DTYPE):
                loss: Tensor = called(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        yield take


PROGRAMS: dict[str, Callable[[_Case], Iterator[Callable[[], Tensor]]]] = {
    "fastbert": _ours,
    "fastbert, captured": lambda case: _ours(case, captured=True),
    "fastbert, reference": lambda case: _ours(case, backend="reference"),
    "transformers": _theirs,
    "transformers, compiled": lambda case: _theirs(case, compiled=True),
}


def _time(row: Row, steps: Iterator[Callable[[], Tensor]], rounds: int, case: _Case) -> None:
    # compilation, capture and every shape once
    for take in itertools.islice(steps, max(WARM_STEPS + 1, BATCHES)):
        loss = take()
    if not loss.isfinite():
        raise ValueError("the loss is not finite")
    torch.cuda.reset_peak_memory_stats()

    def every() -> None:
        for take in itertools.islice(steps, BATCHES):
            take()

    taken = interleaved_ms(
        {row.name: every}, repeats=rounds, warm_up=1, synchronise=torch.cuda.synchronize
    )
    times = spread([time_ms / BATCHES for time_ms in taken[row.name]])
    row.step_ms, row.lowest_ms, row.highest_ms = times.median, times.lowest, times.highest
    row.real_tokens_per_s = 1000.0 * case.tokens / times.median
    row.mfu = case.operations / times.median / 1e9 / PEAK_TFLOP_PER_S
    row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    if row.name == "fastbert":
        case.found.kernels_ms, case.found.kinds_ms = _breakdown(every)


def _breakdown(every: Callable[[], None]) -> tuple[dict[str, float], dict[str, float]]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        every()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        taken = on_device_us(event)
        if taken:
            # over all batches
            kernels[event.key] = taken / 1000.0 / BATCHES
    kinds: dict[str, float] = {}
    for name, ms in kernels.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    largest = sorted(kernels, key=lambda name: -kernels[name])[:15]
    by_time = sorted(kinds, key=lambda kind: -kinds[kind])
    return {name: kernels[name] for name in largest}, {kind: kinds[kind] for kind in by_time}


@functools.cache
def _ceilings() -> gpu.Ceilings:
    return gpu.ceilings()


def _write(path: Path, sizes: list[Size]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "machine": machine.describe(torch.device("cuda")),
        "ceilings": asdict(_ceilings()),
        "case": {**asdict(WIKI), "token_budget": TOKEN_BUDGET, "dropout": DROPOUT},
        "goals": {"real_tokens_per_s": GOALS, "ratios": GOAL_RATIOS},
        "sizes": [asdict(size) for size in sizes],
    }
    with atomic_write(path) as file:
        json.dump(entry, file, indent=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert.bench gpu-step", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["base", "large"], choices=list(GOALS))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (%(default)s)")
    parser.add_argument("--seconds", type=float, default=200.0, help="for all (%(default)s)")
    parser.add_argument("--results", help="folder for one JSON file a device")
    return parser
