"""Optimiser steps of a task: its own loss, class weights and smoothing, attacks on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.models import Targets
from fastbert.packing import PackedBatch
from fastbert.tasks.losses import Shaping
from fastbert.tasks.task import Task
from fastbert.tasks.units import TaskBatch
from fastbert.training.loop import LoopConfig, training_step
from fastbert.training.optimizer import Optimizers
from fastbert.training.row_gradients import embeddings_of, read_sparsely
from fastbert.training.step import CapturedStep, Inputs, TrainingStep, autocast


class TaskStep(TrainingStep):
    """As TrainingStep, by a task's loss.

    Args:
        plain: the step whose model, optimisers and dtype are taken.
        task: whose loss it is.
        shaping: of the loss.
        adversarial: as for `task_backward`.
    """

    def __init__(
        self, plain: TrainingStep, task: Task, shaping: Shaping, adversarial: float
    ) -> None:
        super().__init__(plain.model, plain.optimizers, plain.dtype, plain.clip_norm)
        self.task, self.shaping, self.adversarial = task, shaping, adversarial
        # an attack reads the rows that it moves from a dense gradient
        few_rows = self.device.type == "cpu" and not adversarial
        weight: Any = self.model.word_weight
        self._words = embeddings_of(self.model, weight) if few_rows else []

    def compute(self, inputs: Inputs, rng: Rng | None) -> dict[str, Tensor]:
        """The part on the device: gradients and update; sums by name."""
        loss_scale = self.optimizers.loss_scale
        with read_sparsely(self._words, sum(batch.num_tokens for batch in inputs.batches)):
            sums = task_backward(
                self.task,
                self.model,
                inputs,
                self.dtype,
                rng,
                shaping=self.shaping,
                adversarial=self.adversarial,
                loss_scale=None if loss_scale is None else loss_scale.scale,
            )
        sums.update(self.optimizers.update(self.clip_norm)._asdict())
        return sums


def task_step(
    task: Task,
    model: nn.Module,
    optimizers: Optimizers,
    config: LoopConfig,
    shaping: Shaping,
    adversarial: float,
) -> TaskStep | CapturedStep:
    """What takes the optimiser steps of a run on a task, eager or captured."""
    plain = training_step(model, optimizers, config)
    eager = plain.step if isinstance(plain, CapturedStep) else plain
    step = TaskStep(eager, task, shaping, adversarial)
    return CapturedStep(step) if config.cuda_graph else step


def task_backward(
    task: Task,
    model: Any,
    inputs: Inputs,
    dtype: torch.dtype,
    rng: Rng | None = None,
    *,
    shaping: Shaping | None = None,
    adversarial: float = 0.0,
    loss_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of one optimiser step: k micro-batches give what one batch of them all would.

    Args:
        task: whose loss it is.
        model: the task's.
        inputs: where the model is.
        dtype: of matrix products.
        rng: names the step's dropout draws; None for no dropout.
        shaping: of the loss; None leaves it as it is.
        adversarial: 0, or the length of the step that moves the word embeddings along the step's
            own gradient; the gradients there are added (Miyato et al. 2016, over the whole step).
        loss_scale: gradients are as many times as large.

    Returns:
        Sums over targets: sequence_loss and sequence_correct, whatever the targets are.
    """
    masked, labelled = inputs.targets.unbind()
    targets = Targets(masked, labelled)
    # what the meter divides by is the number of units
    per_unit = labelled / task.targets_shown(targets)
    sums: dict[str, Tensor] = {}

    def backward(record: bool) -> None:
        for place, batch in enumerate(inputs.batches):
            assert isinstance(batch, TaskBatch)
            own = None
            if rng is not None and inputs.state is not None:
                number, state = inputs.numbers[place], inputs.state[place, :3]
                own = Rng(rng.seed, rng.step, number, exact=rng.exact, state=state)
            with autocast(inputs.targets.device, dtype):
                outputs = task.forward(model, batch, own)
                loss = task.loss(outputs, batch, targets, shaping or Shaping())
            (loss.total if loss_scale is None else loss.total * loss_scale).backward()
            if record:
                for name, value in (
                    ("sequence_loss", loss.total.detach() * labelled),
                    ("sequence_correct", loss.correct * per_unit),
                ):
                    sums[name] = sums[name] + value if name in sums else value

    backward(record=True)
    if adversarial:
        _attack(model, inputs.batches, adversarial, lambda: backward(record=False))
    return sums


def _attack(
    model: Any, batches: list[PackedBatch], length: float, backward: Callable[[], None]
) -> None:
    weight: Tensor = model.word_weight
    if weight.grad is None:
        raise InputError("--adversarial: the word embeddings are frozen (--freeze)")
    ids = torch.unique(torch.cat([b.input_ids[: b.num_tokens] for b in batches]))
    with torch.no_grad():
        before = weight[ids]
        slope = weight.grad[ids]
        # a gradient of zero moves nothing
        weight[ids] = before + length * slope / slope.norm().clamp_min(1e-30)
    backward()
    with torch.no_grad():
        weight[ids] = before
