"""One optimiser step on sequences of uneven length: packed by us, padded by transformers.

1. All sides load the same weights; no dropout.
2. Loss and gradients must agree by the error rule, or the row is refused.
3. Steps are taken in turn: forward, backward, clipping, AdamW (fused), gradients dropped.

The second case is transformers' strongest order: a pool of eight such batches, sorted by length
before it is cut into batches; ours takes the pool as it comes. `--compile` adds torch.compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fastbert.bench import step_sides as sides
from fastbert.bench.distributions import NAMED
from fastbert.bench.providers import BF16, COMPILER
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.workload import Workload, step_operations
from fastbert.models import BertForMaskedLM

POOL_BATCHES = 8
DTYPES = ("fp32", "bf16")
NOTES = (
    "transformers: BertForMaskedLM, sdpa, bf16 by autocast, the batch padded to its longest "
    "sequence as its default collator does",
    "flattened: the same model on one row that holds all sequences, a block mask between them; "
    "what its flattening collator does where no FlashAttention is",
    "fastbert: the trainer's TrainingStep on one packed micro-batch with the stream's slots; the "
    "last layer computes the masked rows alone; the attention plan is made anew in every step",
)
POOL_NOTE = (
    f"a step of this case is {POOL_BATCHES} optimiser steps: sorted by length one batch holds "
    "short sequences, another long ones, and only all of them together are the same work"
)


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One batch, and unless quick a pool of them."""
    workload = Workload(
        size=options.size,
        vocab_size=options.vocab_size,
        sequences=options.sequences,
        lengths=options.lengths,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM.from_config(workload.config(), seed=workload.seed).save_pretrained(folder)
        case = batch_case(workload, folder, device, compiled=options.compile)
        # profiling takes as long as everything else of a quick look
        yield dataclasses.replace(case, shares_products=not options.quick)
        if not options.quick:
            yield pool_case(workload, folder, device)


def batch_case(
    workload: Workload, folder: str, device: torch.device, *, compiled: bool = False
) -> Case:
    """One batch, padded to its longest sequence.

    Args:
        workload: what is computed.
        folder: of the model.
        device: that computes.
        compiled: time torch.compile as well (a minute of compilation a row).
    """
    examples = workload.examples()
    providers = []
    for dtype in DTYPES:
        judge = sides.Judge(workload, folder, dtype, device)
        needs = ("transformers", *([BF16] if dtype == "bf16" else []))
        parts = (folder, examples, dtype, device)
        compiler = (*needs, COMPILER)
        providers += [
            Provider(OURS, dtype, sides.ours(*parts), judge.ours, needs),
            Provider("transformers", dtype, sides.padded(*parts), None, needs),
            Provider("transformers, flattened", dtype, sides.flattened(*parts),
                     judge.flattened, needs),
        ]  # fmt: skip
        if compiled:
            providers += [
                Provider("fastbert, compiled", dtype, sides.ours(*parts, compiled=True),
                         judge.ours, compiler),
                Provider("transformers, compiled", dtype, sides.padded(*parts, compiled=True),
                         None, compiler),
            ]  # fmt: skip
    padded = len(examples) * int(examples.lengths.max())
    return _case(_named(workload), workload, padded, providers, NOTES)


def pool_case(workload: Workload, folder: str, device: torch.device) -> Case:
    """Several batches at once, sorted by length for transformers."""
    pool = dataclasses.replace(workload, sequences=POOL_BATCHES * workload.sequences)
    examples = pool.examples()
    batches = sides.sorted_batches(examples, workload.sequences)
    padded = sum(len(part) * int(part.lengths.max()) for part in batches)
    providers = []
    for dtype in DTYPES:
        needs = ("transformers", *([BF16] if dtype == "bf16" else []))
        judge = sides.Judge(workload, folder, dtype, device)
        providers += [
            Provider(OURS, dtype, sides.ours(folder, examples, dtype, device, POOL_BATCHES),
                     judge.ours, needs),
            Provider("transformers, sorted", dtype,
                     sides.padded_batches(folder, batches, dtype, device), None, needs),
        ]  # fmt: skip
    name = f"{_named(pool)}, sorted"
    return _case(name, pool, padded, providers, (*NOTES, POOL_NOTE))


def _case(
    name: str,
    workload: Workload,
    padded: int,
    providers: Sequence[Provider],
    notes: Sequence[str],
) -> Case:
    examples = workload.examples()
    masked = int(examples.num_masked.sum())
    operations = step_operations(workload.config(), examples.lengths, masked)
    work = Work(int(examples.lengths.sum()), padded, operations)
    conditions = dataclasses.asdict(workload) | {"masked_tokens": masked}
    return Case("train-step", name, work, providers, conditions, notes, shares_products=True)


def _named(workload: Workload) -> str:
    lengths = workload.lengths if workload.lengths in NAMED else Path(workload.lengths).name
    return f"{workload.size}, {workload.sequences} x {lengths}"


def _add_flags(parser: argparse.ArgumentParser) -> None:
    standard = Workload()
    parser.add_argument("--size", default=standard.size, help="of the model (%(default)s)")
    parser.add_argument(
        "--vocab-size", type=positive, default=standard.vocab_size, help="(%(default)s)"
    )
    parser.add_argument(
        "--sequences", type=positive, default=standard.sequences, help="a batch (%(default)s)"
    )
    parser.add_argument(
        "--lengths",
        default=standard.lengths,
        help=f"{', '.join(NAMED)}, a number, or a text file (%(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of both as well")


SUITE = Suite("train-step", __doc__, cases, add_flags=_add_flags)
main = SUITE.main
