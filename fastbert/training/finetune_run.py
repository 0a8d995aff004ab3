"""One fine-tuning run: epochs with evaluations between, the best model kept, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.data.epochs import EpochStream
from fastbert.data.stream import Position
from fastbert.tasks.inference import run
from fastbert.tasks.losses import Shaping
from fastbert.tasks.saved import save_task
from fastbert.tasks.task import Scores, Task
from fastbert.tasks.units import Units
from fastbert.tokenizer import Tokenizer
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.loop import Interruption, LoopConfig, compute_dtype, train
from fastbert.training.meter import Meter
from fastbert.training.methods import class_weights, count_layers, freeze_layers, layer_rates
from fastbert.training.optimizer import Optimizers
from fastbert.training.schedule import Budget
from fastbert.training.state import TrainState, load_checkpoint, save_checkpoint
from fastbert.training.task_step import task_step

MODEL_FOLDER = "model"


def scored(task: Task, model: Any, rows: Sequence[Any], units: Units, dtype: torch.dtype) -> Scores:
    """Scores of a model on rows whose answers are known."""
    raw = run(task, model, units, dtype=dtype)
    task.tune(rows, units, raw)
    return task.score(rows, units, raw)


@dataclass
class Run:
    """One run's parts; `train` takes it from wherever its state stands to the end."""

    task: Task
    model: Any
    tokenizer: Tokenizer
    training: Units
    eval_rows: Sequence[Any]
    evaluation: Units
    config: FinetuneConfig
    folder: Path
    meter: Meter
    state: TrainState = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.stream = EpochStream(
            self.training,
            self.task.units_a_step(config.batch_size),
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
        self.trained = freeze_layers(self.model, config.freeze)
        self.optimizers = Optimizers(
            self.model,
            config.optimizer,
            learning_rate=self.peak,
            muon_learning_rate=self.peak,
            weight_decay=config.weight_decay,
            beta2=0.999,
            rate_factor=layer_rates(count_layers(self.model), config.layer_decay),
        )
        counts = self.task.class_counts(self.training) if config.class_weights != "none" else None
        weights = class_weights(config.class_weights, counts)
        # sent once: a step that sends waits, and no graph can hold it
        weights = None if weights is None else weights.to(self.device)
        shaping = Shaping(weights, config.label_smoothing)
        self.state = TrainState()
        if config.resume:
            self.state = load_checkpoint(self.folder, self.model, self.optimizers)
        # one for all epochs, so that a graph is captured once
        self.step = task_step(
            self.task, self.model, self.optimizers, self.loop, shaping, config.adversarial
        )
        self.resumed_tokens, self.resumed_seconds = self.state.tokens, self.state.seconds

    @property
    def train_rows(self) -> int:
        """Rows of the training file, those in no unit left out."""
        assert self.training.rows is not None
        return len(np.unique(self.training.rows))

    def describe(self) -> str:
        """What is about to be done, in one line."""
        units, epochs = len(self.training), self.total_steps / self.stream.steps
        # long rows of some tasks are several units, units of others several rows
        windows = f" in {units:,} {self.task.parts}" if units != self.train_rows else ""
        whole = sum(p.numel() for p in self.model.parameters())
        frozen = "" if self.trained == whole else f" ({self.trained:,} of them trained)"
        classes = f", {len(self.task.labels)} classes" if len(self.task.labels) > 1 else ""
        return (
            f"{whole:,} parameters{frozen} on {self.device.type} in "
            f"{str(self.dtype).removeprefix('torch.')}; {self.train_rows:,} "
            f"{self.task.noun}s{windows} of {self.training.lengths.mean():.1f} tokens on average"
            f"{classes}; {self.total_steps:,} steps of at most {self.config.batch_size} "
            f"({epochs:.3g} epochs), learning rate {self.peak:g}"
        )

    def train(self) -> bool:
        """Epoch by epoch, evaluated between; False where somebody interrupted."""
        state, saved = self.state, self.state.seconds
        while True:
            if not train(
                self.model,
                self.optimizers,
                self.stream.epoch_batches(state.position),
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
                    done |= self.evaluate(done)
                if done:
                    return True
                state.position = Position(state.position.epoch + 1)
                due = state.seconds - saved >= 60.0 * self.config.checkpoint_minutes
                if due or interruption.requested:
                    save_checkpoint(self.folder, state, self.model, self.optimizers)
                    saved = state.seconds
                if interruption.requested:
                    return False

    def evaluate(self, done: bool) -> bool:
        """Score, and write the model if it is the one to keep so far; True to stop early."""
        scores = scored(self.task, self.model, self.eval_rows, self.evaluation, self.dtype)
        figures = scores.figures
        self.meter.evaluation(self.state, figures)
        before = self.state.best
        waited = 0
        if not before or self.task.rank(figures) > self.task.rank(before["figures"]):
            best = True
        else:
            best, waited = False, before["waited"] + 1
        impatient = 0 < self.config.patience <= waited
        done |= impatient
        if best or not self.config.keep_best:
            self.state.best = {"figures": figures, "step": self.state.step}
            if self.config.keep_best or done:
                self.save_model()
        elif done:
            kept = self.task.restore_model(self.folder / MODEL_FOLDER)
            self.model.load_state_dict(kept.state_dict())
        self.state.best["waited"] = waited
        self.state.best["evaluations"] = before.get("evaluations", 0) + 1
        return impatient

    def save_model(self) -> None:
        """The folder that says everything needed to use the model."""
        folder = self.folder / MODEL_FOLDER
        positions = self.model.config.max_seqlen
        self.tokenizer.save_pretrained(folder, model_max_length=positions)
        save_task(self.task, folder)
        self.task.save_model(self.model, folder)

    def report(self) -> dict[str, Any]:
        """What report.json says."""
        state, best = self.state, self.state.best
        seconds = max(state.seconds - self.resumed_seconds, 1e-9)
        return {
            **best["figures"],
            "task": self.task.name,
            "kept_step": best["step"],
            "evaluations": best["evaluations"],
            "labels": self.task.labels,
            "train_rows": self.train_rows,
            "eval_rows": len(self.eval_rows),
            "steps": state.step,
            "stopped_early": state.step < self.total_steps,
            "epochs": round(state.step / self.stream.steps, 3),
            "learning_rate": self.peak,
            "max_seq_len": self.task.max_seq_len,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "real_tokens_per_s": round((state.tokens - self.resumed_tokens) / seconds, 1),
        }

    def summary(self, report: dict[str, Any]) -> str:
        """The end of a run in one line."""
        chosen = ""
        if report["evaluations"] > 1:
            chosen = (
                f"; of {report['evaluations']} evaluations the best, at step "
                f"{report['kept_step']} of {report['steps']}"
                if report["kept_step"] != report["steps"]
                else f"; of {report['evaluations']} evaluations, at the last step"
            )
        early = " (stopped early)" if report["stopped_early"] else ""
        return (
            f"{self.task.summarise(self.state.best['figures'])}{chosen}{early}; "
            f"{report['seconds']:.0f} s, {report['real_tokens_per_s']:,.0f} real tokens a second"
        )
