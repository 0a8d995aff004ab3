"""One optimiser step as one function of tensors: eager everywhere, or captured in a CUDA graph.

1. The host sends what the step needs: batches, targets, random state, learning rates.
2. Forward and backward of each micro-batch, every objective divided by the step's targets.
3. Unscale, clip, update; gradients that are not finite change nothing.

Parts 2 and 3 never ask the device, so that a graph can hold them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.kernels.ops import Rng, overwrite, sent
from fastbert.models import Targets
from fastbert.packing import PackedBatch
from fastbert.training.fsdp import synchronise
from fastbert.training.optimizer import Optimizers
from fastbert.training.parallel import Ranks
from fastbert.training.result import StepResult

# eager steps before the capture: libraries make their workspaces, optimisers their state
WARM_STEPS = 3
# graphs of other shapes keep memory of their own
MOST_GRAPHS = 4


@dataclass
class Inputs:
    """What a step reads, where the model is.

    Attributes:
        batches: one a micro-batch.
        state: [micro-batches, 4] int64, seed, step, micro-batch and nothing of each; None without
            dropout. Rows begin at multiples of 16 bytes: kernels know one alignment, not two.
        numbers: of the micro-batches within the step of all ranks.
        targets: [2] fp32, masked and labelled targets of the whole step, at least 1 each.
    """

    batches: list[PackedBatch]
    state: Tensor | None
    targets: Tensor
    numbers: range

    @classmethod
    def send(
        cls,
        micro_batches: list[PackedBatch],
        rng: Rng | None,
        device: torch.device,
        ranks: Ranks | None = None,
        targets: Targets | None = None,
    ) -> Inputs:
        """Copy to the device without waiting for it; `targets` are those of all ranks."""
        ranks = ranks or Ranks()
        # as the step numbers them, whoever computes them
        numbers = range(ranks.rank, len(micro_batches) * ranks.count, ranks.count)
        targets = targets or Targets.of(*micro_batches)
        batches = list(micro_batches)
        if device.type != "cpu":
            batches = [batch.to(device, non_blocking=True) for batch in micro_batches]
        state = None if rng is None else sent(_state(rng, numbers), device, non_blocking=True)
        counts = sent(_counts(targets), device, non_blocking=True)
        return cls(batches, state, counts, numbers)

    def copy_(self, micro_batches: list[PackedBatch], rng: Rng | None) -> None:
        """Write another step of the same shapes into this memory, without waiting."""
        for target, source in zip(self.batches, micro_batches, strict=True):
            target.copy_(source)
        if self.state is not None and rng is not None:
            overwrite(self.state, _state(rng, self.numbers))
        overwrite(self.targets, _counts(Targets.of(*micro_batches)))


class TrainingStep:
    """Runs optimiser steps eagerly.

    Args:
        model: of `fastbert.models`, with a head.
        optimizers: cover the model.
        dtype: of matrix products.
        clip_norm: norm of the gradients above which they are scaled down; 0 for never.
        ranks: that share every step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        dtype: torch.dtype,
        clip_norm: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.model, self.optimizers = model, optimizers
        self.dtype, self.clip_norm = dtype, clip_norm
        self.device = next(model.parameters()).device

    def __call__(
        self,
        micro_batches: list[PackedBatch],
        rng: Rng | None,
        factor: float,
        targets: Targets | None = None,
    ) -> StepResult:
        """Train on the micro-batches of one step, at `factor` times the peak learning rates.

        Args:
            micro_batches: of this rank.
            rng: names the step's dropout draws; None for no dropout.
            factor: of the peak learning rates.
            targets: of all ranks; None for those of the micro-batches.
        """
        self.optimizers.set_rates(factor)
        inputs = Inputs.send(micro_batches, rng, self.device, self.ranks, targets)
        sums = self.compute(inputs, rng)
        return _result(micro_batches, sums)

    def compute(self, inputs: Inputs, rng: Rng | None) -> dict[str, Tensor]:
        """The part on the device: gradients and update; sums by name."""
        loss_scale = self.optimizers.loss_scale
        scale = None if loss_scale is None else loss_scale.scale
        sums = backward(self.model, inputs, self.dtype, rng, scale)
        self.ranks.reduce_gradients(self.model)
        self.ranks.reduce_sums(sums, self.device)
        sums.update(self.optimizers.update(self.clip_norm)._asdict())
        return sums


def accumulate(
    model: nn.Module,
    micro_batches: list[PackedBatch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rng: Rng | None = None,
    ranks: Ranks | None = None,
    targets: Targets | None = None,
) -> StepResult:
    """Gradients of one optimiser step: k micro-batches give what one batch of them all would.

    Args:
        model: of `fastbert.models`, with a head.
        micro_batches: on the host.
        device: where the model is.
        dtype: of matrix products.
        rng: names the step's dropout draws; None for no dropout.
        ranks: the processes that share the step; these are the micro-batches of this one.
        targets: of all ranks.
    """
    ranks = ranks or Ranks()
    inputs = Inputs.send(micro_batches, rng, device, ranks, targets)
    sums = backward(model, inputs, dtype, rng)
    ranks.reduce_gradients(model)
    ranks.reduce_sums(sums, device)
    return _result(micro_batches, sums)


def backward(
    model: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype,
    rng: Rng | None = None,
    loss_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """`accumulate` on what is on the device already; gradients are `loss_scale` times as large.

    Returns:
        Sums over targets by name.
    """
    masked, labelled = inputs.targets.unbind()
    sums: dict[str, Tensor] = {}
    for place, batch in enumerate(inputs.batches):
        sharded = synchronise(model, place + 1 == len(inputs.batches))
        if not batch.num_tokens and not sharded:
            # the other ranks have one more
            continue
        own = None
        if rng is not None and inputs.state is not None:
            number, state = inputs.numbers[place], inputs.state[place, :3]
            own = Rng(rng.seed, rng.step, number, exact=rng.exact, state=state)
        with autocast(inputs.targets.device, dtype):
            output = model(batch, rng=own, targets=Targets(masked, labelled))
        loss = output.loss if loss_scale is None else output.loss * loss_scale
        loss.backward()
        for name, value in (
            ("masked_lm_loss", output.masked_lm_loss_sum),
            ("masked_lm_correct", output.masked_lm_correct),
            ("sequence_loss", output.sequence_loss_sum),
            ("sequence_correct", output.sequence_correct),
        ):
            if value is not None:
                sums[name] = sums[name] + value if name in sums else value
    return sums


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for bf16 and fp16, nothing for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class CudaGraphs:
    """Work on the device, recorded once each and replayed at the cost of one launch.

    All share one memory: what a replay leaves is to be copied before another one.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream()

    def record(
        self, work: Callable[[], dict[str, Tensor]]
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """Record what `work` launches, without doing it.

        Returns:
            What does it, and the memory of its results.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            results = work()
        return graph.replay, results

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to a stream of its own, as capture asks of the steps before it."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield
        torch.cuda.current_stream().wait_stream(self._side)


@dataclass
class _Recorded:
    replay: Callable[[], None]
    inputs: Inputs
    sums: dict[str, Tensor]


class CapturedStep:
    """A training step whose part on the device is one CUDA graph.

    The first steps, the first one of every shape, and steps of shapes that came too late for a
    graph, run eagerly: the same function, the same numbers.

    Args:
        step: the eager step.
        graphs: record and replay.

    Attributes:
        replayed, eager: steps so far.
    """

    def __init__(self, step: TrainingStep, graphs: type[CudaGraphs] = CudaGraphs) -> None:
        self.step, self._graphs = step, graphs()
        self._recorded: dict[Any, _Recorded] = {}
        self._tried: set[Any] = set()
        self.replayed = self.eager = 0

    def __call__(
        self, micro_batches: list[PackedBatch], rng: Rng | None, factor: float
    ) -> StepResult:
        """As TrainingStep."""
        shapes = tuple(batch.shapes() for batch in micro_batches)
        recorded = self._recorded.get(shapes)
        if recorded is None:
            late = len(self._recorded) == MOST_GRAPHS
            # kernels made for a shape are compiled when it first runs, which no capture allows
            if late or self.eager < WARM_STEPS or shapes not in self._tried:
                return self._eagerly(micro_batches, rng, factor, None if late else shapes)
            recorded = self._recorded[shapes] = self._record(micro_batches, rng)
        self.step.optimizers.set_rates(factor)
        recorded.inputs.copy_(micro_batches, rng)
        recorded.replay()
        self.replayed += 1
        # the next replay writes over its results
        return _result(micro_batches, {name: t.clone() for name, t in recorded.sums.items()})

    def _eagerly(
        self, micro_batches: list[PackedBatch], rng: Rng | None, factor: float, shapes: Any
    ) -> StepResult:
        """Outside of any graph; `shapes` where a graph of them may follow."""
        self.eager += 1
        if shapes is None:
            return self.step(micro_batches, rng, factor)
        self._tried.add(shapes)
        with self._graphs.aside():
            return self.step(micro_batches, rng, factor)

    def _record(self, micro_batches: list[PackedBatch], rng: Rng | None) -> _Recorded:
        # memory of its own, on a CPU too
        inputs = Inputs.send(copy.deepcopy(micro_batches), rng, self.step.device)
        replay, sums = self._graphs.record(lambda: self.step.compute(inputs, rng))
        return _Recorded(replay, inputs, sums)


def _result(micro_batches: list[PackedBatch], sums: dict[str, Tensor]) -> StepResult:
    tokens = sum(batch.num_tokens for batch in micro_batches)
    slots = sum(batch.capacity for batch in micro_batches)
    return StepResult(tokens, Targets.of(*micro_batches), sums, slots)


def _state(rng: Rng, numbers: range) -> Tensor:
    cpu = torch.device("cpu")
    draws = [Rng(rng.seed, rng.step, number) for number in numbers]
    return F.pad(torch.stack([draw.device_state(cpu) for draw in draws]), (0, 1))


def _counts(targets: Targets) -> Tensor:
    counts = [max(targets.masked, 1), max(targets.labelled, 1)]
    return torch.tensor(counts, dtype=torch.float32)
