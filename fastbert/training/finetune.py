"""Fine-tuning on labelled texts: tables to a classifier's folder in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.data.epochs import EpochStream, steps_an_epoch
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertForSequenceClassification, resolve_model
from fastbert.packing import Examples
from fastbert.tasks.classifier import TaskFacts, load_for_labels
from fastbert.tasks.classify import build_examples, check_labels, label_set, score
from fastbert.tasks.table import Row, read_same_columns, read_table
from fastbert.tokenizer import Tokenizer
from fastbert.training.curves import draw_curves
from fastbert.training.fields import check_fields
from fastbert.training.loop import (
    Interruption,
    LoopConfig,
    compute_dtype,
    default_device,
    describe_path,
    refuse_graph,
    train,
    training_step,
)
from fastbert.training.meter import Meter
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.schedule import Budget
from fastbert.training.state import (
    TrainState,
    check_run,
    claim_run,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)

MODEL_FOLDER, REPORT_FILE = "model", "report.json"
# the published recipe's (Devlin et al. 2018); small files need more passes to get anywhere
# (Mosbach et al. 2020, arXiv:2006.04884)
EPOCHS, FEWEST_STEPS, MOST_EPOCHS = 3, 200, 20
# hidden size from which on a peak serves: narrow models want larger steps (Turc et al. 2019)
LEARNING_RATES = ((1024, 3e-5), (768, 5e-5), (384, 1e-4), (0, 3e-4))
SHORTEST = 8


@dataclass
class FinetuneConfig:
    """Settings of `fastbert finetune classify`; every field is a flag of that name.

    Raises:
        InputError: a value out of range; the message names the flag.
    """

    model: str = field(metadata={"help": "pre-trained model: a run of pretrain, or a model folder"})
    train: str = field(metadata={"help": "labelled texts: .tsv, .csv or .jsonl with column names"})
    eval: str = field(metadata={"help": "labelled texts to score on, with the same columns"})
    out: str = field(metadata={"help": "folder of the run; must be new, or --resume"})
    text_column: str | None = field(default=None, metadata={"help": "guessed from the names"})
    pair_column: str | None = field(
        default=None, metadata={"help": "second text of a pair; guessed from the names"}
    )
    label_column: str | None = field(default=None, metadata={"help": "guessed from the names"})
    epochs: float | None = field(
        default=None,
        metadata={"help": "passes over --train; default 3, for small files up to 20 (200 steps)"},
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "optimiser steps, in place of --epochs"}
    )
    batch_size: int = field(default=32, metadata={"help": "texts an optimiser step"})
    accumulation: int = field(
        default=1, metadata={"help": "parts a step is computed in, to save memory"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon"})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak; default by width: 3e-5 large, 5e-5 base, 1e-4 small, 3e-4 mini"},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices and embeddings"})
    warmup: float = field(default=0.1, metadata={"help": "share of the run spent warming up"})
    dropout: float = field(
        default=0.1, metadata={"help": "in training, whatever pre-training had; 0 for none"}
    )
    max_seq_len: int | None = field(
        default=None,
        metadata={"help": "tokens a sequence at most; default the model's positions"},
    )
    seed: int = field(default=0, metadata={"help": "of order, dropout and new weights"})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (bf16 where the hardware has it), fp32, bf16 or fp16"},
    )
    cuda_graph: bool = field(
        default=False, metadata={"help": "a step's work on the GPU as one captured graph"}
    )
    evaluate_epochs: int = field(
        default=1, metadata={"help": "epochs between evaluations; 0 for one at the end alone"}
    )
    keep_best: bool = field(
        default=True, metadata={"help": "keep the model of the best evaluation, not the last"}
    )
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "between checkpoints"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --out"})

    def __post_init__(self) -> None:
        check_fields(self)
        for name, lowest, exclusive in (
            ("epochs", 0, True),
            ("max_steps", 1, False),
            ("batch_size", 1, False),
            ("accumulation", 1, False),
            ("learning_rate", 0, True),
            ("weight_decay", 0, False),
            ("max_seq_len", SHORTEST, False),
            ("evaluate_epochs", 0, False),
        ):
            value = getattr(self, name)
            if value is not None and not (value > lowest if exclusive else value >= lowest):
                flag, bound = name.replace("_", "-"), "more than" if exclusive else "at least"
                raise InputError(f"--{flag} must be {bound} {lowest}, got {value}")
        for name in ("warmup", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        compute_dtype(self.dtype, torch.device("cpu"))
        if self.cuda_graph:
            refuse_graph(self.optimizer, default_device())

    def steps(self, steps_an_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is not None:
            return max(round(self.epochs * steps_an_epoch), 1)
        wanted = max(FEWEST_STEPS, EPOCHS * steps_an_epoch)
        return min(wanted, MOST_EPOCHS * steps_an_epoch)

    def peak(self, hidden_size: int) -> float:
        """The peak learning rate for a model of this width."""
        if self.learning_rate is not None:
            return self.learning_rate
        return next(rate for width, rate in LEARNING_RATES if hidden_size >= width)


def finetune_classify(config: FinetuneConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Read labelled texts, fine-tune a pre-trained model on them, and leave a classifier.

    Args:
        config: everything.
        say: told what happens, a line at a time.

    Returns:
        As `finetune_from`.

    Raises:
        InputError: bad settings, tables or model files; nothing has been written then.
    """
    settings = {"command": "finetune classify", **dataclasses.asdict(config)}
    del settings["resume"]
    check_run(config.out, settings, resume=config.resume)
    finished = Path(config.out) / REPORT_FILE
    if config.resume and finished.is_file():
        say(f"{config.out}: the run is finished, there is nothing to resume")
        report: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return report
    source = resolve_model(config.model)
    training = read_table(
        config.train,
        text_column=config.text_column,
        pair_column=config.pair_column,
        label_column=config.label_column,
    )
    say(training.describe())
    evaluation = read_same_columns(config.eval, training)
    say(evaluation.describe())
    labels = label_set(training.rows, config.train)
    check_labels(evaluation.rows, labels, config.eval)
    steps_an_epoch(len(training.rows), config.batch_size, config.accumulation)
    tokenizer = Tokenizer.from_pretrained(source)
    model, fresh = load_for_labels(source, labels, dropout=config.dropout, seed=config.seed)
    if fresh:
        say(f"{source}: new weights for the {' and '.join(fresh)}, the rest as read")
    _check_fit(model.config, tokenizer, config, str(source))
    folder = claim_run(config.out, settings, resume=config.resume)
    return finetune_from(model, tokenizer, training.rows, evaluation.rows, config, folder, say=say)


def finetune_from(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    config: FinetuneConfig,
    folder: Path,
    *,
    label: str = "fine-tune",
    say: Callable[[str], None] = print,
    stream: IO[str] | None = None,
) -> dict[str, Any]:
    """Train a model on rows, whatever its weights; as `finetune_classify`, which calls it.

    Args:
        model: `config.labels` of it is the label set; holds the kept weights afterwards.
        tokenizer: the model's.
        train_rows, eval_rows: their labels are in the label set.
        config: model, train, eval, out, the columns and dropout of it are not looked at.
        folder: of the run, there already; gets model/, report.json, metrics.jsonl, curves.png.
        label: in front of the progress bar.
        say: told what happens.
        stream: where the progress bar goes; standard error where None.

    Returns:
        The report, as written to `report.json`; empty where the run was interrupted.

    Raises:
        InputError: settings that the model or the rows do not allow.
    """
    _check_fit(model.config, tokenizer, config, "model")
    max_seq_len = config.max_seq_len or model.config.max_seqlen
    facts = TaskFacts(any(row.second is not None for row in train_rows), max_seq_len)
    run = _Run(
        model=model.to(default_device()),
        tokenizer=tokenizer,
        training=build_examples(
            train_rows, tokenizer, model.config.labels, max_seq_len, name="training", say=say
        ),
        evaluation=build_examples(
            eval_rows, tokenizer, model.config.labels, max_seq_len, name="evaluation", say=say
        ),
        config=config,
        facts=facts,
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
    with atomic_write(folder / REPORT_FILE) as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    draw_curves(folder, f"{label}: {len(train_rows):,} texts, {run.total_steps:,} steps")
    remove_checkpoints(folder)
    say(f"{label}: {_summary(report)}")
    say(f"{label}: model in {folder / MODEL_FOLDER}")
    return report


@dataclass
class _Run:
    """One run's parts; `train` takes it from wherever its state stands to the end."""

    model: BertForSequenceClassification
    tokenizer: Tokenizer
    training: Examples
    evaluation: Examples
    config: FinetuneConfig
    facts: TaskFacts
    folder: Path
    meter: Meter
    state: TrainState = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.stream = EpochStream(
            self.training,
            config.batch_size,
            config.accumulation,
            config.seed,
            fixed_shapes=config.cuda_graph,
        )
        self.total_steps = config.steps(self.stream.steps)
        self.loop = LoopConfig(
            budget=Budget(max_steps=self.total_steps),
            warmup=config.warmup,
            accumulation=config.accumulation,
            seed=config.seed,
            dtype=config.dtype,
            cuda_graph=config.cuda_graph,
            checkpoint_minutes=config.checkpoint_minutes,
        )
        self.device = next(self.model.parameters()).device
        self.dtype = compute_dtype(config.dtype, self.device)
        self.peak = config.peak(self.model.config.hidden_size)
        self.optimizers = Optimizers(
            self.model,
            config.optimizer,
            learning_rate=self.peak,
            muon_learning_rate=self.peak,
            weight_decay=config.weight_decay,
            beta2=0.999,
        )
        self.state = TrainState()
        if config.resume:
            self.state = load_checkpoint(self.folder, self.model, self.optimizers)
        # one for all epochs, so that a graph is captured once
        self.step = training_step(self.model, self.optimizers, self.loop)
        self.resumed_tokens, self.resumed_seconds = self.state.tokens, self.state.seconds

    def describe(self) -> str:
        examples, epochs = len(self.training), self.total_steps / self.stream.steps
        mean = self.training.lengths.mean()
        return (
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters on "
            f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}; {examples:,} texts "
            f"of {mean:.1f} tokens on average, {len(self.model.config.labels)} classes; "
            f"{self.total_steps:,} steps of at most {self.config.batch_size} ({epochs:.3g} "
            f"epochs), learning rate {self.peak:g}"
        )

    def train(self) -> bool:
        """Epoch by epoch, evaluated between; False where somebody interrupted."""
        state, saved = self.state, self.state.seconds
        while True:
            batches = self.stream.epoch_batches(state.position)
            if not train(
                self.model,
                self.optimizers,
                batches,
                self.loop,
                state,
                self.meter,
                self.folder,
                run=self.step,
            ):
                return False
            done = state.step >= self.total_steps
            every = self.config.evaluate_epochs
            with Interruption() as interruption:
                if done or (every and (state.position.epoch + 1) % every == 0):
                    self.evaluate(done)
                if done:
                    return True
                state.position = Position(state.position.epoch + 1)
                due = state.seconds - saved >= 60.0 * self.config.checkpoint_minutes
                if due or interruption.requested:
                    save_checkpoint(self.folder, state, self.model, self.optimizers)
                    saved = state.seconds
                if interruption.requested:
                    return False

    def evaluate(self, done: bool) -> None:
        """Score, and write the model if it is the one to keep so far."""
        figures = score(self.model, self.evaluation, dtype=self.dtype)
        self.meter.evaluation(self.state, figures)
        before = self.state.best
        if not self.config.keep_best or not before or _rank(figures) > _rank(before):
            self.state.best = {**figures, "step": self.state.step}
            if self.config.keep_best or done:
                self.save_model()
        elif done:
            kept = BertForSequenceClassification.from_pretrained(self.folder / MODEL_FOLDER)
            self.model.load_state_dict(kept.state_dict())
        self.state.best["evaluations"] = before.get("evaluations", 0) + 1

    def save_model(self) -> None:
        folder = self.folder / MODEL_FOLDER
        positions = self.model.config.max_seqlen
        self.tokenizer.save_pretrained(folder, model_max_length=positions)
        self.facts.save(folder)
        self.model.save_pretrained(folder)

    def report(self) -> dict[str, Any]:
        state, best = self.state, self.state.best
        seconds = max(state.seconds - self.resumed_seconds, 1e-9)
        return {
            **{name: best[name] for name in ("accuracy", "macro_f1", "majority", "loss")},
            "kept_step": best["step"],
            "evaluations": best["evaluations"],
            "labels": self.model.config.labels,
            "train_rows": len(self.training),
            "eval_rows": len(self.evaluation),
            "steps": state.step,
            "epochs": round(state.step / self.stream.steps, 3),
            "learning_rate": self.peak,
            "max_seq_len": self.facts.max_seq_len,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "real_tokens_per_s": round((state.tokens - self.resumed_tokens) / seconds, 1),
        }


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


def _rank(figures: dict[str, float]) -> tuple[float, float]:
    return figures["accuracy"], -figures["loss"]


def _summary(report: dict[str, Any]) -> str:
    chosen = ""
    if report["evaluations"] > 1:
        chosen = (
            f"; of {report['evaluations']} evaluations the best, at step {report['kept_step']} "
            f"of {report['steps']}"
            if report["kept_step"] != report["steps"]
            else f"; of {report['evaluations']} evaluations, at the last step"
        )
    return (
        f"accuracy {report['accuracy']:.1%}, macro-F1 {report['macro_f1']:.1%} "
        f"(majority {report['majority']:.1%}){chosen}; {report['seconds']:.0f} s, "
        f"{report['real_tokens_per_s']:,.0f} real tokens a second"
    )
