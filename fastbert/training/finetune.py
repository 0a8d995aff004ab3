"""Fine-tuning on any task: rows to a model folder in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.data.epochs import steps_an_epoch
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import resolve_model
from fastbert.tasks.classify import Classify
from fastbert.tasks.task import Task, first_row, say_overlap
from fastbert.tokenizer import Tokenizer
from fastbert.training.curves import draw_curves
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.finetune_run import MODEL_FOLDER, Run
from fastbert.training.loop import default_device, describe_path
from fastbert.training.meter import Meter
from fastbert.training.methods import count_layers, parse_freeze
from fastbert.training.run_folder import check_run, claim_run
from fastbert.training.state import remove_checkpoints

REPORT_FILE = "report.json"


def finetune(
    task: Task,
    config: FinetuneConfig,
    say: Callable[[str], None] = print,
    begun: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Read rows, fine-tune a pre-trained model on them, and leave a model that can be asked.

    Args:
        task: with its options.
        config: everything else; `seeds` is not looked at (`training.seeds` does).
        say: told what happens, a line at a time.
        begun: called once all has been looked at, and the folder is the run's.

    Returns:
        As `finetune_from`.

    Raises:
        InputError: bad settings, files or model; nothing has been written then.
    """
    settings = run_settings(task, config)
    check_run(config.out, settings, resume=config.resume)
    finished = Path(config.out) / REPORT_FILE
    if config.resume and finished.is_file():
        say(f"{config.out}: the run is finished, there is nothing to resume")
        report: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return report
    source = resolve_model(config.model)
    training = task.read(config.train, say)
    first_row(task, config.train, training, say)
    evaluation = task.read(config.eval, say)
    task.fit(training, config.train)
    task.check(evaluation, config.eval)
    say_overlap(task, config.eval, training, evaluation, say)
    examples = task.examples(training, config.train, say)
    steps_an_epoch(len(examples), task.units_a_step(config.batch_size), config.accumulation)
    tokenizer = Tokenizer.from_pretrained(source)
    model, fresh = task.load(source, dropout=config.dropout, seed=config.seed)
    if fresh:
        say(f"{source}: new weights for the {' and '.join(fresh)}, the rest as read")
    _check_fit(model.config, tokenizer, config, str(source))  # type: ignore[arg-type]
    refuse_unfit(task, model, config)
    folder = claim_run(config.out, settings, resume=config.resume)
    if begun is not None:
        begun()
    return finetune_from(model, tokenizer, examples, evaluation, config, folder, task=task, say=say)


def run_settings(task: Task, config: FinetuneConfig) -> dict[str, Any]:
    """What run.json says: the command with all its flags."""
    options = {
        f.name: getattr(task, f.name) for f in dataclasses.fields(task) if "help" in f.metadata
    }
    settings = {"command": f"finetune {task.name}", **dataclasses.asdict(config), **options}
    del settings["resume"]
    return settings


def finetune_from(
    model: Any,
    tokenizer: Tokenizer,
    train_rows: Sequence[Any],
    eval_rows: Sequence[Any],
    config: FinetuneConfig,
    folder: Path,
    *,
    task: Task | None = None,
    label: str = "fine-tune",
    say: Callable[[str], None] = print,
    stream: IO[str] | None = None,
) -> dict[str, Any]:
    """Train a model on rows, whatever its weights; as `finetune`, which calls it.

    Args:
        model: of the task, `config.labels` of it its label set; holds the kept weights afterwards.
        tokenizer: the model's.
        train_rows, eval_rows: the task's, which has looked at them; to train on, its `examples`.
        config: model, train, eval, out and dropout of it are not looked at.
        folder: of the run, there already; gets model/, report.json, metrics.jsonl, curves.png.
        task: None for classification by the model's labels.
        label: in front of the progress bar.
        say: told what happens.
        stream: where the progress bar goes; standard error where None.

    Returns:
        The report, as written to `report.json`; empty where the run was interrupted.

    Raises:
        InputError: settings that the model or the rows do not allow.
    """
    _check_fit(model.config, tokenizer, config, "model")
    if task is None:
        task = Classify()
        task.labels = list(model.config.labels)
        task.pair = any(row.second is not None for row in train_rows)
    task.max_seq_len = config.max_seq_len or model.config.max_seqlen
    run = Run(
        task=task,
        model=model.to(default_device()),
        tokenizer=tokenizer,
        training=task.build(train_rows, tokenizer, name="training", say=say),
        eval_rows=eval_rows,
        evaluation=task.build(eval_rows, tokenizer, name="evaluation", say=say),
        config=config,
        folder=folder,
        meter=Meter(folder, label, stream),
    )
    say(f"{label}: {describe_path(run.device)}")
    say(f"{label}: {run.describe()}")
    began = time.monotonic()
    finished = run.train()
    run.meter.close()
    if not finished:
        step = run.state.step
        say(f"{label}: interrupted at step {step}; saved. To go on: the same with --resume")
        return {}
    report = {**run.report(), "wall_seconds": round(time.monotonic() - began, 1)}
    write_report(folder, report)
    draw_curves(folder, f"{label}: {run.train_rows:,} {task.noun}s, {run.state.step:,} steps")
    remove_checkpoints(folder)
    say(f"{label}: {run.summary(report)}")
    say(f"{label}: model in {folder / MODEL_FOLDER}")
    return report


def refuse_unfit(task: Task, model: Any, config: FinetuneConfig) -> None:
    """Look at what a run asks of a task, before anything is written.

    Raises:
        InputError: a setting that the task's loss would not look at, or nothing left to train.
    """
    for name, given in (
        ("class_weights", config.class_weights != "none"),
        ("label_smoothing", config.label_smoothing > 0),
    ):
        if given and name not in task.shaped_by:
            flag, value = name.replace("_", "-"), getattr(config, name)
            raise InputError(f"--{flag} {value}: the loss of {task.name} here has no classes")
    depth = count_layers(model)
    if parse_freeze(config.freeze) >= depth and not task.has_head:
        raise InputError(
            f"--freeze {config.freeze}: {task.name} here has no head; nothing would be trained"
        )
    if config.freeze.isdigit() and int(config.freeze) > depth:
        raise InputError(f"--freeze {config.freeze}: the model has {depth} layers")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json."""
    with atomic_write(folder / REPORT_FILE) as file:
        json.dump(report, file, indent=2)
        file.write("\n")


def _check_fit(
    encoder: EncoderConfig, tokenizer: Tokenizer, config: FinetuneConfig, where: str
) -> None:
    positions = encoder.max_seqlen
    if config.max_seq_len is not None and config.max_seq_len > positions:
        raise InputError(
            f"--max-seq-len {config.max_seq_len}: {where} has {positions} positions "
            "(max_position_embeddings)"
        )
    refuse_foreign_tokenizer(tokenizer.vocab_size, encoder, where)
