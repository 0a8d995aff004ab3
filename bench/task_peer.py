"""The other side of `fastbert bench tasks`: transformers' Trainer on the same sequences.

The Trainer gets the very token ids that our side packs, padded to the longest of each batch, the
same checkpoint, dropout, batch size, epochs, peak learning rate, warm-up and dtype. What its model
says of the evaluation rows is read and scored by our task.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.config import EncoderConfig
from fastbert.packing import IGNORE_INDEX
from fastbert.tasks.losses import widened
from fastbert.tasks.task import Raw, Task
from fastbert.tasks.units import Units
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.step import autocast

# tasks that transformers has a class for, and that class
CLASSES = {
    "classify": "AutoModelForSequenceClassification",
    "similarity": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
}
# what padding is filled with
_FILLS = {"token_type_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
_SCORED_AT_ONCE = 32
# checkpoints a run, of which one is kept
_SAVES = 5
_CLOCK = "seconds.txt"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What the Trainer left.

    Attributes:
        model: in evaluation mode.
        seconds: of training, those before it was stopped included.
    """

    model: nn.Module
    seconds: float


def missing() -> str | None:
    """The line that installs what the Trainer needs; None where it is there."""
    absent = [
        name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None
    ]
    return f"no {' and '.join(absent)}: pip install 'fastbert[bench]'" if absent else None


def rows_of(task: Task, units: Units) -> Rows:
    """Every sequence as the Trainer's datasets hold it, with its targets under their names."""
    rows = []
    for number, (ids, types) in enumerate(zip(units.input_ids, units.token_type_ids, strict=True)):
        row: dict[str, Any] = {"input_ids": ids, "token_type_ids": types}
        if task.name == "classify" and units.unit_labels is not None:
            row["labels"] = int(units.unit_labels[number])
        elif task.name == "similarity" and units.values is not None:
            row["labels"] = float(units.values[number, 0])
        elif task.name == "tag" and units.token_labels is not None:
            row["labels"] = units.token_labels[number]
        elif task.name == "answer" and units.places is not None:
            start, end = units.places[number].tolist()
            row |= {"start_positions": start, "end_positions": end}
        rows.append(row)
    return rows


def collator(pad_id: int) -> Callable[[Rows], dict[str, Tensor]]:
    """Pads the rows of a batch to its longest, as DataCollatorWithPadding does."""

    def collate(rows: Rows) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        rows = [{**row, "attention_mask": np.ones_like(row["input_ids"])} for row in rows]
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], int | float):
                batch[name] = torch.tensor(values)
                continue
            column = np.full((len(rows), longest), _FILLS.get(name, pad_id), dtype=np.int64)
            for place, value in enumerate(values):
                column[place, : len(value)] = value
            batch[name] = torch.from_numpy(column)
        return batch

    return collate


def load(task: Task, source: str | Path) -> nn.Module:
    """transformers' model for a task, on the checkpoint in `source`."""
    package = peers.transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    fields: dict[str, Any] = {}
    if task.name != "answer":
        fields["num_labels"] = len(task.labels)
    if task.name == "similarity":
        fields["problem_type"] = "regression"
    model = getattr(package, CLASSES[task.name]).from_pretrained(
        source, dtype=torch.float32, local_files_only=True, **fields
    )
    return model  # type: ignore[no-any-return]


def trainer(
    task: Task,
    model: nn.Module,
    units: Units,
    config: FinetuneConfig,
    pad_id: int,
    folder: Path,
    dtype: torch.dtype,
    **fields: Any,
) -> Any:
    """A Trainer with our settings in its own words.

    Args:
        task: of the units.
        model: of `load`.
        units: to train on.
        config: epochs, batch size, rates and seed of it are taken.
        pad_id: of the tokenizer.
        folder: for what it writes.
        dtype: bf16 for autocast.
        fields: further TrainingArguments.
    """
    package = peers.transformers()
    encoder = EncoderConfig.from_pretrained(config.model)
    steps = config.steps(math.ceil(len(units) / config.batch_size))
    arguments = package.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": config.batch_size,
            "max_steps": steps,
            "learning_rate": config.peak(encoder.hidden_size),
            "warmup_steps": config.warmup,
            "weight_decay": config.weight_decay,
            "seed": config.seed,
            "bf16": dtype == torch.bfloat16,
            "use_cpu": not torch.cuda.is_available(),
            "save_steps": max(steps // _SAVES, 1),
            "save_total_limit": 1,
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **fields,
        }
    )
    found = package.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(task, units),
        data_collator=collator(pad_id),
    )
    found.remove_callback(package.PrinterCallback)
    return found


def train(
    task: Task, units: Units, config: FinetuneConfig, pad_id: int, folder: Path, dtype: torch.dtype
) -> Trained:
    """Fine-tune by the Trainer; goes on from its last checkpoint where it was stopped."""
    package = peers.transformers()
    package.set_seed(config.seed)
    runner = trainer(task, load(task, config.model), units, config, pad_id, folder, dtype)
    last = package.trainer_utils.get_last_checkpoint(str(folder)) if folder.is_dir() else None
    before = 0.0 if last is None else float((Path(last) / _CLOCK).read_text(encoding="utf-8"))
    runner.add_callback(_clock(package.TrainerCallback, before))
    found = runner.train(resume_from_checkpoint=last)
    ran = found.metrics["train_runtime"] if last is None or found.global_step > _step(last) else 0.0
    return Trained(runner.model.eval(), before + ran)


def _clock(callback: type, before: float) -> Any:
    """Writes into every checkpoint how long training took until then."""

    class Clock(callback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_save(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
            seconds = before + time.monotonic() - self.began
            folder = Path(arguments.output_dir) / f"checkpoint-{state.global_step}"
            (folder / _CLOCK).write_text(str(round(seconds, 2)), encoding="utf-8")

    return Clock()


def _step(checkpoint: str) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def raw_outputs(task: Task, model: nn.Module, units: Units, pad_id: int, dtype: torch.dtype) -> Raw:
    """What the peer's model says of all sequences, as our tasks read it."""
    device = next(model.parameters()).device
    bare = [
        {name: row[name] for name in ("input_ids", "token_type_ids")}
        for row in rows_of(task, units)
    ]
    order = np.argsort([len(row["input_ids"]) for row in bare], kind="stable")
    found: dict[int, np.ndarray] = {}
    collate = collator(pad_id)
    with torch.inference_mode(), autocast(device, dtype):
        for start in range(0, len(order), _SCORED_AT_ONCE):
            chosen = order[start : start + _SCORED_AT_ONCE].tolist()
            batch = {
                name: values.to(device)
                for name, values in collate([bare[number] for number in chosen]).items()
            }
            values = widened(_numbers(task, model(**batch))).cpu().numpy()
            for number, own in zip(chosen, values, strict=True):
                length = len(bare[number]["input_ids"])
                found[number] = own if task.name in ("classify", "similarity") else own[:length]
    outputs = [found[number] for number in range(len(bare))]
    if task.name in ("classify", "similarity"):
        return Raw(sequences=np.stack(outputs))
    return Raw(tokens=outputs)


def figures(
    task: Task, model: nn.Module, rows: Sequence[Any], units: Units, pad_id: int, dtype: torch.dtype
) -> dict[str, float]:
    """The peer's scores, by our task's own scorer."""
    raw = raw_outputs(task, model, units, pad_id, dtype)
    task.tune(rows, units, raw)
    return task.score(rows, units, raw).figures


def _numbers(task: Task, outputs: Any) -> Tensor:
    if task.name == "answer":
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    logits: Tensor = outputs.logits
    return logits
