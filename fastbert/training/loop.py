"""The training loop: exact losses over micro-batches, one update, meter, checkpoints, a clean stop.

1. Take the micro-batches of one optimiser step; their target counts are known on the host.
2. Forward and backward each, every objective divided by the step's targets.
3. Clip, set the learning rate from the progress, update.
4. Now and then: show the meter, evaluate, write a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import nn

from fastbert.data.curriculum import Curriculum
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.models import Targets
from fastbert.packing import PackedBatch
from fastbert.training.loss_scale import LossScale
from fastbert.training.meter import Meter
from fastbert.training.operations import training_operations
from fastbert.training.optimizer import Optimizers
from fastbert.training.parallel import Ranks
from fastbert.training.schedule import SCHEDULES, Budget, learning_rate_factor
from fastbert.training.sharded_state import save_run
from fastbert.training.spikes import SpikeGuard
from fastbert.training.state import TrainState
from fastbert.training.step import CapturedStep, TrainingStep, accumulate, autocast
from fastbert.training.timed import Timed

__all__ = [
    "DTYPES",
    "Interruption",
    "LoopConfig",
    "accumulate",
    "autocast",
    "compute_dtype",
    "default_device",
    "describe_path",
    "has_fast_bf16",
    "refuse_graph",
    "train",
    "training_step",
]

DTYPES = ("auto", "fp32", "bf16", "fp16")
_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# steps in a row without finite gradients after which a run has gone astray: a loss scale of fp16
# has come down to 1 by then
MOST_SKIPPED = 20


@dataclass
class LoopConfig:
    """How a model is trained, whatever the task."""

    budget: Budget
    schedule: str = "linear"
    # share of the run over which the learning rate rises
    warmup: float = 0.06
    # micro-batches an optimiser step
    accumulation: int = 1
    # how that grows over the run; None for the same throughout
    curriculum: Curriculum | None = None
    # gradient norm above which gradients are scaled down; 0 for never
    clip_norm: float = 1.0
    # dropout as the model's configuration has it
    dropout: bool = True
    seed: int = 0
    dtype: str = "auto"
    # the part of a step on the device as one CUDA graph
    cuda_graph: bool = False
    evaluate_minutes: float = 5.0
    checkpoint_minutes: float = 5.0
    # newest checkpoints that stay
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"--schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0.0 <= self.warmup < 1.0:
            raise InputError(f"--warmup must be in [0, 1), got {self.warmup}")
        if self.accumulation < 1:
            raise InputError(f"--accumulation must be at least 1, got {self.accumulation}")

    def accumulation_at(self, group: int) -> int:
        """Micro-batches of the optimiser step that takes the text's batches as number `group`."""
        return self.curriculum.accumulation_at(group) if self.curriculum else self.accumulation


class Interruption:
    """Notes Ctrl-C and SIGTERM, so that the loop ends after the step in hand.

    What an outer one has noted an inner one knows: around the loop, before and after which there is
    work that should not be torn off either. A second signal raises KeyboardInterrupt.
    """

    _outermost: ClassVar[Interruption | None] = None

    def __init__(self) -> None:
        self._noted = False

    @property
    def requested(self) -> bool:
        """Whether somebody asked for the end."""
        return (Interruption._outermost or self)._noted

    def __enter__(self) -> Interruption:
        self._previous: dict[int, Any] = {}
        if Interruption._outermost is not None:
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            # handlers can be set in the main thread alone
            with contextlib.suppress(ValueError):
                self._previous[number] = signal.signal(number, self._note)
        if self._previous:
            Interruption._outermost = self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if Interruption._outermost is self:
            Interruption._outermost = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True


def default_device() -> torch.device:
    """This process's GPU, or else the CPU; under torchrun each process of a machine has its own.

    Raises:
        InputError: more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = os.environ.get("LOCAL_RANK")
    if place is None:
        return torch.device("cuda")
    count = torch.cuda.device_count()
    if int(place) >= count:
        raise InputError(
            f"torchrun: process {int(place) + 1} of this machine has no GPU, there "
            f"{'is' if count == 1 else 'are'} {count}; --nproc-per-node must be at most that"
        )
    device = torch.device("cuda", int(place))
    # kernels, streams and collectives go to the current one
    torch.cuda.set_device(device)
    return device


def describe_path(device: torch.device) -> str:
    """Which path operators take on a device, for the start of a run.

    Raises:
        InputError: the environment asks for a path that cannot run here.
    """
    try:
        return ops.describe(device)
    except (RuntimeError, ValueError) as error:
        raise InputError(str(error)) from None


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """What --dtype means on a device; "auto" is bf16 where the hardware multiplies it.

    Raises:
        InputError: an unknown name.
    """
    if name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return _TORCH_DTYPES[name]


def refuse_graph(device: torch.device, processes: int = 1) -> None:
    """Raise InputError where --cuda-graph cannot be had; for the start of a run."""
    if processes > 1:
        raise InputError(
            f"--cuda-graph: for one process, torchrun has started {processes}; leave it out, or "
            "start one"
        )
    if device.type != "cuda":
        raise InputError(f"--cuda-graph: needs a CUDA or HIP device, this run is on {device.type}")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run on units made for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def training_step(
    model: nn.Module, optimizers: Optimizers, config: LoopConfig, ranks: Ranks | None = None
) -> TrainingStep | CapturedStep:
    """What takes the optimiser steps of a run, eager or captured."""
    device = next(model.parameters()).device
    dtype = compute_dtype(config.dtype, device)
    if dtype == torch.float16 and optimizers.loss_scale is None:
        optimizers.loss_scale = LossScale(device)
    step = TrainingStep(model, optimizers, dtype, config.clip_norm, ranks)
    return CapturedStep(step) if config.cuda_graph else step


def train(
    model: nn.Module,
    optimizers: Optimizers,
    batches: Iterator[tuple[PackedBatch, Position]],
    config: LoopConfig,
    state: TrainState,
    meter: Meter,
    folder: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
    run: TrainingStep | CapturedStep | None = None,
    ranks: Ranks | None = None,
    guard: SpikeGuard | None = None,
) -> bool:
    """Train until the budget is spent or somebody interrupts.

    Args:
        model: of `fastbert.models`, with a head.
        optimizers: cover the model.
        batches: micro-batches, each with the position after it; the run ends where they do.
        config: how to train.
        state: is brought up to date in place; resumes where it says.
        meter: told of every step.
        folder: of the run; checkpoints go there.
        evaluate: called now and then; its figures go to the meter.
        run: takes each step; from `training_step`, for runs of several calls. Made here where None.
        ranks: that train together; the first one evaluates and saves.
        guard: takes the run back to before a loss spike.

    Returns:
        Whether the run was finished, not interrupted; an interrupted one has been saved.

    Raises:
        InputError: gradients stay infinite, or a checkpoint cannot be written.
    """
    ranks = ranks or Ranks()
    run = run or training_step(model, optimizers, config, ranks)
    started = time.monotonic() - state.seconds
    evaluated = saved = state.seconds
    timed = Timed(batches)
    if guard is not None:
        guard.begin(state)

    def save(wait: bool) -> None:
        kept = config.keep_checkpoints
        save_run(folder, state, model, optimizers, ranks, wait=wait, keeper=guard, kept=kept)

    with Interruption() as interruption:
        while config.budget.progress(state.step, state.seconds) < 1.0:
            share = -(-config.accumulation_at(state.groups) // ranks.count)
            window = timed.take(share)
            if not window:
                break
            rng = Rng(config.seed, state.step) if config.dropout else None
            micro_batches = [batch for batch, _ in window]
            agreed = ranks.agree(
                Targets.of(*micro_batches),
                sum(batch.num_tokens for batch in micro_batches),
                time.monotonic() - started if ranks.count > 1 else state.seconds,
                interruption.requested,
            )
            # the middle of the step: no step runs at a rate of 0
            middle = config.budget.progress(state.step + 0.5, agreed.seconds)
            factor = learning_rate_factor(config.schedule, middle, config.warmup)
            operations = training_operations(model.config, micro_batches)
            if isinstance(run, TrainingStep) and ranks.count > 1:
                with ranks.watched():
                    result = run(micro_batches, rng, factor, agreed.targets)
                result.tokens, result.targets = agreed.tokens, agreed.targets
                result.slots *= ranks.count
            else:
                result = run(micro_batches, rng, factor)
            state.step += 1
            state.tokens += result.tokens
            state.slots += result.slots
            # other ranks' batches are as full as this one's
            result.operations = operations * ranks.count
            result.waited_s = timed.waited_s
            state.position = window[-1][1]
            state.seconds = agreed.seconds if ranks.count > 1 else time.monotonic() - started
            meter.step(state, result, optimizers.learning_rate(), config.budget)
            if guard is not None:
                last = config.budget.progress(state.step, state.seconds) >= 1.0
                spike = guard.watch(state, result, micro_batches, last)
                if spike is not None:
                    meter.flush(state, optimizers.learning_rate(), config.budget)
                    meter.spike(spike, guard.roll_back(state))
            stop = agreed.stop if ranks.count > 1 else interruption.requested
            checkpoint_due = state.seconds - saved >= 60.0 * config.checkpoint_minutes
            about_to_save = stop or checkpoint_due
            if about_to_save:
                # no checkpoint of steps whose losses nobody has looked at
                meter.flush(state, optimizers.learning_rate(), config.budget)
            _refuse_non_finite(meter, state, 1 if about_to_save else MOST_SKIPPED)
            if stop:
                save(wait=True)
                return False
            evaluation_due = state.seconds - evaluated >= 60.0 * config.evaluate_minutes
            # what is due is due on all ranks: by the clock that they share
            now = state.seconds
            if evaluate and ranks.scores and evaluation_due:
                with meter.paused(), ranks.watched():
                    meter.evaluation(state, evaluate())
                state.seconds = time.monotonic() - started
                evaluated = now if ranks.count > 1 else state.seconds
            if checkpoint_due:
                with meter.paused():
                    save(wait=False)
                state.seconds = time.monotonic() - started
                saved = now if ranks.count > 1 else state.seconds
    meter.flush(state, optimizers.learning_rate(), config.budget)
    _refuse_non_finite(meter, state, 1)
    return True


def _refuse_non_finite(meter: Meter, state: TrainState, most: int) -> None:
    """Steps without finite gradients change nothing; `most` of them in a row end the run."""
    if meter.skipped_in_a_row >= most and not math.isfinite(meter.step_loss):
        raise InputError(
            f"step {state.step}: the loss is {meter.step_loss}; lower --learning-rate or raise "
            "--warmup. Checkpoints written before are untouched"
        )
    if meter.skipped_in_a_row >= MOST_SKIPPED:
        raise InputError(
            f"step {state.step}: no finite gradients for {meter.skipped_in_a_row} steps; lower "
            "--learning-rate, or take --dtype bf16 or fp32"
        )
