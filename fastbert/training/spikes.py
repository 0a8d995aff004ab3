"""Loss spikes: noticed a little late, so that nobody waits for the device, and undone.

1. Every step's loss and gradient norm travel to the host by themselves, and are read `LAG` steps
   later.
2. Each is held against the running mean and standard deviation of the steps before it. A value
   far above them is a spike; values that were not finite are left to the update, which skips them.
3. A spike takes weights, moments and statistics back to the last copy of them, some steps before,
   and training goes on with the batches that come next: those since the copy are left out
   (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.1).

When copies are made and values are read is a function of the step alone, and a checkpoint holds
the copy and what is unread: a resumed run sees the same spikes and goes back to the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.packing import PackedBatch
from fastbert.training.optimizer import Optimizers
from fastbert.training.result import StepResult
from fastbert.training.shards import part
from fastbert.training.state import TrainState

# steps after which a step's values are read: they have arrived by then
LAG = 2
# values seen before any is judged, and how much a new one weighs after them
FEWEST, WEIGHT = 50, 0.02
# smallest standard deviations: of the loss, relative; of the logarithm of the gradient norm
LEAST_RELATIVE, LEAST_LOG = 0.01, 0.05
# times a run goes back to one copy; a spike after them is no matter of batches
MOST_ROLLBACKS = 3
# what of a run's state goes back with its weights
_COUNTED = ("step", "tokens", "slots")


@dataclass
class Level:
    """Running mean and variance of one figure."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def deviations(self, value: float, least: float) -> float:
        """How many standard deviations, `least` being the smallest, a value lies above the mean."""
        if self.count < FEWEST:
            return 0.0
        return (value - self.mean) / max(math.sqrt(self.variance), least)

    def add(self, value: float) -> None:
        """Take a value into account."""
        self.count += 1
        weight = max(1.0 / self.count, WEIGHT)
        distance = value - self.mean
        self.mean += weight * distance
        self.variance = (1.0 - weight) * (self.variance + weight * distance * distance)


@dataclass
class Levels:
    """What is usual of loss and gradient norm."""

    loss: Level = field(default_factory=Level)
    log_norm: Level = field(default_factory=Level)

    def deviations(self, loss: float, norm: float) -> float:
        """The larger of both."""
        return max(
            self.loss.deviations(loss, LEAST_RELATIVE * abs(self.loss.mean)),
            self.log_norm.deviations(math.log(max(norm, 1e-30)), LEAST_LOG),
        )

    def add(self, loss: float, norm: float) -> None:
        """Take a step into account."""
        self.loss.add(loss)
        self.log_norm.add(math.log(max(norm, 1e-30)))

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Levels:
        """The inverse of `dataclasses.asdict`."""
        return cls(Level(**raw["loss"]), Level(**raw["log_norm"]))


class Figures:
    """Loss and gradient norm of one step, on their way to the host.

    Args:
        step: the number of the step, counted from 1.
        values: [3] fp32 on the device: loss, norm, and 1 where the step was skipped.
        samples: global sample indices of its batches.
    """

    def __init__(self, step: int, values: Tensor, samples: list[int]) -> None:
        self.step, self.samples = step, samples
        self._arrived = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = values.clone()

    def read(self) -> tuple[float, float, bool]:
        """Loss, gradient norm, and whether both are finite numbers of a step that counted."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, skipped = self._values.tolist()
        return loss, norm, not skipped and math.isfinite(loss) and math.isfinite(norm)

    def raw(self) -> dict[str, Any]:
        """For a checkpoint."""
        self.read()
        # as text, for JSON knows no NaN; of 32 bits, so that nothing is lost
        values = [repr(value) for value in self._values.tolist()]
        return {"step": self.step, "values": values, "samples": self.samples}

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Figures:
        """The inverse of `raw`."""
        values = torch.tensor([float(value) for value in raw["values"]])
        return cls(raw["step"], values, list(raw["samples"]))


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm was far above the usual.

    Attributes:
        step: its number.
        loss, gradient_norm: its values.
        usual_loss, usual_norm: the running means before it.
        deviations: above them, in standard deviations.
        samples: global sample indices of its batches, those of the first rank.
    """

    step: int
    loss: float
    gradient_norm: float
    usual_loss: float
    usual_norm: float
    deviations: float
    samples: list[int]


class SpikeGuard:
    """Watches steps, and takes a run back to before a spike.

    Args:
        model, optimizers: what is copied and taken back.
        sigma: standard deviations above the mean that make a spike.
        every: steps between copies, which lie in the host's memory.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, sigma: float, every: int) -> None:
        self.model, self.optimizers = model, optimizers
        self.sigma, self.every = sigma, every
        self.levels = Levels()
        self._unread: deque[Figures] = deque()
        self._rollbacks = 0
        self._copy: dict[str, Tensor] = {}
        self._copied: dict[str, Any] = {}

    def begin(self, state: TrainState) -> None:
        """Copy what a run starts with; nothing where a checkpoint brought its copy."""
        if not self._copied:
            self._take(state)

    def watch(
        self, state: TrainState, result: StepResult, batches: list[PackedBatch], last: bool
    ) -> Spike | None:
        """Take the step just done into account.

        Args:
            state: after it.
            result: of it.
            batches: of it.
            last: the run would end here, so that everything is read.

        Returns:
            A spike that is to be undone by `roll_back`.
        """
        self._unread.append(Figures(state.step, _values(result), _samples(batches)))
        due = state.step % self.every == 0
        while self._unread and (due or last or len(self._unread) > LAG):
            spike = self._judge(self._unread.popleft())
            if spike is not None:
                return spike
        if due:
            self._rollbacks = 0
            self._take(state)
        return None

    def roll_back(self, state: TrainState) -> dict[str, int]:
        """Go back to the copy; the position stays, so that its batches are not seen again.

        Returns:
            from_step, to_step: which steps' batches are left out of the run.
        """
        now = self._tensors()
        with torch.no_grad():
            for name, tensor in now.items():
                kept = self._copy.get(name)
                # moments that came into being after the copy were nothing then
                tensor.zero_() if kept is None else tensor.copy_(kept)
        span = {"from_step": self._copied["step"] + 1, "to_step": state.step}
        state.left_out += state.step - self._copied["step"]
        for name in _COUNTED:
            setattr(state, name, self._copied[name])
        state.rollbacks.append(span)
        self.levels = Levels.of(self._copied["levels"])
        self._unread.clear()
        self._rollbacks += 1
        return span

    def raw(self) -> dict[str, Any]:
        """For a checkpoint, beside `state_tensors`."""
        return {
            "levels": dataclasses.asdict(self.levels),
            "unread": [figures.raw() for figures in self._unread],
            "rollbacks": self._rollbacks,
            "copied": self._copied,
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """The copy by name, arrived."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return self._copy

    def load(self, raw: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `raw` and `state_tensors`."""
        self.levels = Levels.of(raw["levels"])
        self._unread = deque(Figures.of(one) for one in raw["unread"])
        self._rollbacks, self._copied = int(raw["rollbacks"]), dict(raw["copied"])
        self._copy = tensors

    def _judge(self, figures: Figures) -> Spike | None:
        loss, norm, finite = figures.read()
        if not finite:
            return None
        deviations = self.levels.deviations(loss, norm)
        if deviations > self.sigma and self._rollbacks < MOST_ROLLBACKS:
            usual = self.levels.loss.mean, math.exp(self.levels.log_norm.mean)
            return Spike(figures.step, loss, norm, *usual, deviations, figures.samples)
        self.levels.add(loss, norm)
        return None

    def _take(self, state: TrainState) -> None:
        # a new copy each time: the last one may be on its way to a checkpoint
        self._copy = {name: _to_host(tensor) for name, tensor in self._tensors().items()}
        self._copied = {
            **{name: getattr(state, name) for name in _COUNTED},
            "levels": dataclasses.asdict(self.levels),
        }

    def _tensors(self) -> dict[str, Tensor]:
        named = {
            **{f"model/{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"optimizer/{k}": tensor for k, tensor in self.optimizers.state_tensors().items()},
        }
        # of a model in shards, every rank keeps its own
        return {name: part(tensor) for name, tensor in named.items()}


def _values(result: StepResult) -> Tensor:
    """[3] fp32 where the step ran."""
    sums = result.sums
    counts = {"masked_lm_loss": result.targets.masked, "sequence_loss": result.targets.labelled}
    losses = [sums[name] / max(count, 1) for name, count in counts.items() if name in sums]
    loss = torch.stack([loss.detach().float() for loss in losses]).sum()
    return torch.stack([loss, sums["gradient_norm"].float(), sums["skipped"].float().reshape(())])


def _samples(batches: list[PackedBatch]) -> list[int]:
    return [
        index
        for batch in batches
        if batch.sample_ids is not None
        for index in batch.sample_ids[: batch.num_sequences].tolist()
    ]


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    # in the order of the stream: after the update before it, before the one after it
    return host.copy_(tensor.detach(), non_blocking=True)
