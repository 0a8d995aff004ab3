"""Examples a second of our trainer and of transformers' Trainer, in turn, on the same sequences.

1. Both sides start from one folder: the same weights, the same fresh head.
2. Their outputs must agree by the error rule in fp32, or nothing is timed.
3. Each side takes the same rows through its whole loop, from fresh moments, one after the other, in
   rounds; the Trainer in random order, which is its default. (Its grouping by length sorts within
   50 batches and would need passes many times as long.)
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import task_peer
from fastbert.bench.parity import Parity
from fastbert.config import EncoderConfig
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.tasks.inference import run as run_task
from fastbert.tasks.task import Raw, Task
from fastbert.tasks.units import Units
from fastbert.tokenizer import Tokenizer
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.finetune_run import Run
from fastbert.training.loop import compute_dtype, default_device, train
from fastbert.training.meter import Meter

# tokens of a pass, and optimiser steps at least and at most
PASS_TOKENS, FEWEST, MOST = 16_384, 2, 32
OURS, THEIRS = "fastbert", "trainer"
_PARITY_ROWS = 16


@dataclasses.dataclass
class Pass:
    """What every side trains on.

    Attributes:
        task: fitted.
        model: ours, on the CPU; every round starts from a copy.
        tokenizer: the model's.
        units: of one pass.
        config: `model` is a folder that holds the same weights.
        dtype: of matrix products.
    """

    task: Task
    model: nn.Module
    tokenizer: Tokenizer
    units: Units
    config: FinetuneConfig
    dtype: torch.dtype

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return -(-len(self.units) // self.config.batch_size)


def measure(
    task: Task, rows: list[Any], config: FinetuneConfig, *, rounds: int = 5
) -> dict[str, Any]:
    """Time both trainers.

    Args:
        task: fitted.
        rows: to draw the pass from.
        config: of the case; model, batch size, rates, seed and dtype of it are taken.
        rounds: that count; one more goes before them.

    Returns:
        Seconds a pass by side, a list each; what the pass holds; and the share of the Trainer's
        slots that is padding.

    Raises:
        InputError: the two sides do not compute the same, or transformers is missing.
    """
    source = Path(config.model)
    tokenizer = Tokenizer.from_pretrained(source)
    model, _ = task.load(source, dropout=config.dropout, seed=config.seed)
    positions = EncoderConfig.from_pretrained(source).max_seqlen
    task.max_seq_len = config.max_seq_len or positions
    units = drawn_units(task, rows, tokenizer, config)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        task.save_model(model, start)
        once = dataclasses.replace(config, model=str(start), epochs=1, max_steps=None)
        dtype = compute_dtype(config.dtype, default_device())
        one = Pass(task, model, tokenizer, units, once, dtype)
        refuse_other_numbers(one)
        seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
        padding = 0.0
        for number in range(rounds + 1):
            for name, taken in seconds.items():
                if name == OURS:
                    spent = _ours(one, Path(folder))
                else:
                    spent, padding = _theirs(one, Path(folder))
                if number:
                    taken.append(round(spent, 4))
    return {
        "examples": len(units),
        "steps": one.steps,
        "tokens": int(units.lengths.sum()),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "padding": round(padding, 4),
    }


def drawn_units(task: Task, rows: list[Any], tokenizer: Tokenizer, config: FinetuneConfig) -> Units:
    """Rows at random, so many that the first step, which makes moments, is a small part."""
    order = np.random.default_rng(config.seed).permutation(len(rows)).tolist()
    size = config.batch_size
    sample = task.build([rows[number] for number in order[: 8 * size]], tokenizer)
    wanted = round(PASS_TOKENS / (float(sample.lengths.mean()) * size))
    steps = min(max(wanted, FEWEST), MOST, max(len(rows) // size, 1))
    return task.build([rows[number] for number in order[: steps * size]], tokenizer)


def _ours(one: Pass, folder: Path) -> float:
    with open(folder / "steps.log", "w", encoding="utf-8") as stream:
        run = Run(
            task=one.task,
            model=copy.deepcopy(one.model).to(default_device()),
            tokenizer=one.tokenizer,
            training=one.units,
            eval_rows=[],
            evaluation=one.units,
            config=one.config,
            folder=folder,
            meter=Meter(folder, "pass", stream),
        )
        batches = run.stream.epoch_batches(Position())
        began = time.perf_counter()
        train(
            run.model,
            run.optimizers,
            batches,
            run.loop,
            run.state,
            run.meter,
            run.folder,
            run=run.step,
        )
        return time.perf_counter() - began


def _theirs(one: Pass, folder: Path) -> tuple[float, float]:
    """Seconds of a pass, and the share of padding in its batches."""
    pad, all_slots, real = task_peer.collator(one.tokenizer.pad_id), 0, 0

    def collate(rows: task_peer.Rows) -> dict[str, Tensor]:
        nonlocal all_slots, real
        batch = pad(rows)
        all_slots += batch["attention_mask"].numel()
        real += sum(len(row["input_ids"]) for row in rows)
        return batch

    runner = task_peer.trainer(
        one.task,
        task_peer.load(one.task, one.config.model),
        one.units,
        one.config,
        one.tokenizer.pad_id,
        folder / "trainer",
        one.dtype,
        save_strategy="no",
    )
    runner.data_collator = collate
    # its own clock, which leaves out what comes before the first step
    seconds = float(runner.train().metrics["train_runtime"])
    return seconds, 1 - real / max(all_slots, 1)


def refuse_other_numbers(one: Pass) -> None:
    """Hold our outputs in fp32 to the peer's.

    Raises:
        InputError: outside the error rule.
    """
    few = Units(one.units.input_ids[:_PARITY_ROWS], one.units.token_type_ids[:_PARITY_ROWS])
    pad_id = one.tokenizer.pad_id
    peer = task_peer.load(one.task, one.config.model).eval()
    ours = run_task(one.task, one.model.eval(), few)
    theirs = task_peer.raw_outputs(one.task, peer, few, pad_id, torch.float32)
    oracle = task_peer.raw_outputs(one.task, peer.double(), few, pad_id, torch.float32)
    parity = Parity(torch.float32)
    parity.add({"outputs": _flat(ours)}, {"outputs": _flat(theirs)}, {"outputs": _flat(oracle)})
    failures = parity.failures()
    if failures:
        raise InputError(f"{one.task.name}: not the Trainer's numbers: {failures[0]}")


def _flat(raw: Raw) -> Tensor:
    parts = raw.tokens if raw.sequences is None else [raw.sequences]
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts or []]))
