"""Several processes that train one model: what they must agree on, and when.

`torchrun` starts them. Each holds the whole model, or a part of it (`fsdp.py`), takes its share of
every optimiser step's batches, and after the last of them gradients are summed once. Losses are
divided by the targets of all ranks, so that ranks x accumulation is one number: 1 x 4, 2 x 2 and
4 x 1 are the same step.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.models import Targets

# what each rank holds of the model: a copy, or a part of every parameter
PARALLEL = ("ddp", "fsdp")
# gradients travel in pieces of so many elements: large enough to fill the links
BUCKET_ELEMENTS = 1 << 23
# after which a rank that waits for a lost one gives up
TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step before they compute it.

    Attributes:
        targets: of all ranks.
        tokens: of all ranks.
        seconds: the first rank's clock.
        stop: whether any rank was asked to stop.
    """

    targets: Targets
    tokens: int
    seconds: float
    stop: bool


class Ranks:
    """This process among those that train together.

    Attributes:
        rank: of this process; the first one, 0, writes files and talks.
        count: of all.
        sharded: whether each holds a part of the model (FSDP2), not a copy.
        beside: over which a thread talks to those of other ranks, beside training; where sharded.
        writing: a thread that does.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, sharded: bool = False) -> None:
        self.rank, self.count, self.sharded = rank, count, sharded
        # counts are known on the host: a group of its own keeps them off the device
        self._host = dist.new_group(backend="gloo") if count > 1 else None
        shared = sharded and dist.is_initialized()
        self.beside = dist.new_group(backend="gloo", timeout=TIMEOUT) if shared else None
        self.writing: threading.Thread | None = None

    @classmethod
    def from_environment(cls, device: torch.device, *, sharded: bool = False) -> Ranks:
        """Join the processes that torchrun started; alone where it did not.

        Args:
            device: that this process computes on.
            sharded: whether they will share one model; one process makes a group of its own then.

        Raises:
            InputError: the others cannot be reached.
        """
        count = processes_started()
        if count == 1 and not sharded:
            return cls()
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone: dict[str, Any] = {}
        if count == 1:
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            if not dist.is_initialized():
                dist.init_process_group(backend, timeout=TIMEOUT, **alone)
        except (RuntimeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise InputError(f"torchrun: cannot join {count} processes: {line}") from None
        return cls(dist.get_rank(), count, sharded=sharded)

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def scores(self) -> bool:
        """Whether this process evaluates: of a model in shards, all must."""
        return self.first or self.sharded

    def agree(self, targets: Targets, tokens: int, seconds: float, stop: bool) -> Agreed:
        """Sum what each rank brings to a step.

        Args:
            targets, tokens: of this rank's batches.
            seconds: this rank's clock; the first one's counts.
            stop: whether this rank was asked to stop.

        Raises:
            InputError: another rank is gone.
        """
        if self.count == 1:
            return Agreed(targets, tokens, seconds, stop)
        clock = seconds if self.first else 0.0
        sums = torch.tensor(
            [targets.masked, targets.labelled, tokens, clock, float(stop)], dtype=torch.float64
        )
        self._sum(sums, self._host)
        masked, labelled, tokens_of_all, agreed, stops = sums.tolist()
        return Agreed(Targets(int(masked), int(labelled)), int(tokens_of_all), agreed, stops > 0)

    def reduce_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its sum over ranks; a rank without batches counts as zero."""
        if self.count == 1 or self.sharded:
            return
        for bucket in _buckets(list(model.parameters())):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._sum(flat)
            for parameter, summed in zip(
                bucket, flat.split([p.numel() for p in bucket]), strict=True
            ):
                parameter.grad = summed.view_as(parameter)

    def reduce_sums(self, sums: dict[str, Tensor], device: torch.device) -> None:
        """Replace sums that are reported by those of all ranks, in place."""
        if self.count == 1:
            return
        flat = torch.zeros(len(REPORTED), dtype=torch.float64, device=device)
        for place, name in enumerate(REPORTED):
            if name in sums:
                flat[place] = sums[name]
        self._sum(flat)
        sums.update({name: flat[place] for place, name in enumerate(REPORTED)})

    def told(self, number: int) -> int:
        """The first rank's number."""
        return self._sum_of(number if self.first else 0)

    def told_by_any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return self._sum_of(int(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._sum_of(0)

    def close(self) -> None:
        """Leave the others, once nothing is written any more."""
        if self.writing is not None:
            self.writing.join()
        if (self.count > 1 or self.sharded) and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, where torch talks to other ranks by itself, one that is lost is told so.

        Raises:
            InputError: another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.count == 1 or not ("gloo" in text or "nccl" in text):
                raise
            raise self._gone(error) from None

    def _sum_of(self, number: int) -> int:
        if self.count == 1:
            return number
        total = torch.tensor([number])
        self._sum(total, self._host)
        return int(total)

    def _sum(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
        try:
            dist.all_reduce(tensor, group=group)
        except RuntimeError as error:
            raise self._gone(error) from None

    def _gone(self, error: RuntimeError) -> InputError:
        line = str(error).splitlines()[0]
        return InputError(
            f"rank {self.rank} of {self.count}: another rank is gone ({line}); the same "
            "command with --resume goes on from the last checkpoint"
        )


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that talks."""
    return os.environ.get("RANK", "0") == "0"


def processes_started() -> int:
    """By torchrun, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


REPORTED = ("masked_lm_loss", "masked_lm_correct", "sequence_loss", "sequence_correct")


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In the order of the model, which is the same on every rank."""
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        bucket.append(parameter)
        elements += parameter.numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket
