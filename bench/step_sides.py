"""The sides of a training step: ours on packed batches, transformers on padded or flattened ones.

Every function returns what a `Provider` calls to load its model and get its step. All clip
gradients, update with fused AdamW and drop the gradients, from the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.bench.parity import Parity
from fastbert.bench.timing import Step
from fastbert.bench.workload import Workload, packed, part_of
from fastbert.models import BertForMaskedLM, Model
from fastbert.packing import Examples, PackedBatch, best_fit
from fastbert.training.loop import accumulate, autocast
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import TrainingStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP_NORM = 1e-4, 0.01, (0.9, 0.98), 1e-8, 1.0
# parity is judged on this many small batches pooled, since fp64 on the whole one takes long
PARITY_BATCHES, PARITY_SEQUENCES, PARITY_LONGEST = 5, 4, 64

Make = Callable[[], Step]


def ours(
    folder: str,
    examples: Examples,
    dtype: str,
    device: torch.device,
    batches: int = 1,
    *,
    compiled: bool = False,
) -> Make:
    """Packed micro-batches, a step each: `batches` of them share the tokens by best fit."""

    def make() -> Step:
        model = BertForMaskedLM.from_pretrained(folder).to(device).train()
        optimizers = Optimizers(
            model, "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=BETAS[1]
        )
        if compiled:
            model.compile(dynamic=False)
        step = TrainingStep(model, optimizers, DTYPES[dtype], CLIP_NORM)
        dealt = packed_batches(examples, batches)

        def take() -> None:
            for batch in dealt:
                # a batch object of its own, so that its layout is worked out as for a fresh batch
                step([dataclasses.replace(batch)], None, 1.0)

        return take

    return make


def packed_batches(examples: Examples, batches: int) -> list[PackedBatch]:
    """All sequences in so many packed batches, or one more where they do not fit."""
    if batches == 1:
        return [packed(examples)]
    lengths = examples.lengths
    budget = max(-(-int(lengths.sum()) // batches), int(lengths.max()))
    dealt = best_fit(lengths, budget, len(examples))
    return [packed(examples, np.asarray(part)) for part in dealt]


def padded(
    folder: str, examples: Examples, dtype: str, device: torch.device, *, compiled: bool = False
) -> Make:
    """transformers on the whole batch, padded to its longest sequence."""
    return padded_batches(folder, [examples], dtype, device, compiled=compiled)


def padded_batches(
    folder: str,
    batches: Sequence[Examples],
    dtype: str,
    device: torch.device,
    *,
    compiled: bool = False,
) -> Make:
    """transformers on padded batches, a step each."""

    def make() -> Step:
        made = [peers.padded(part, device) for part in batches]
        return _their_step(folder, made, dtype, device, compiled=compiled)

    return make


def flattened(folder: str, examples: Examples, dtype: str, device: torch.device) -> Make:
    """transformers on one row of all sequences, with positions and a mask of blocks."""
    return lambda: _their_step(folder, [peers.flattened(examples, device)], dtype, device)


def sorted_batches(examples: Examples, sequences: int) -> list[Examples]:
    """Batches of neighbours in length, as group_by_length makes them."""
    order = np.argsort(examples.lengths, kind="stable")
    parts = (order[start : start + sequences] for start in range(0, len(order), sequences))
    return [part_of(examples, part) for part in parts]


def _their_step(
    folder: str,
    batches: list[dict[str, Tensor]],
    dtype: str,
    device: torch.device,
    *,
    compiled: bool = False,
) -> Step:
    model = peers.bert_for_masked_lm(folder, device)
    called: Any = torch.compile(model, dynamic=False) if compiled else model
    groups = peers.parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step() -> None:
        for batch in batches:
            with autocast(device, DTYPES[dtype]):
                loss = called(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


class Judge:
    """Loss and all gradients beside transformers on padded batches, against the same in fp64.

    Args:
        workload: whose kind the small batches are.
        folder: of the model.
        dtype: of both sides.
        device: that computes.
        batches: pooled; None for `PARITY_BATCHES`.
    """

    def __init__(
        self,
        workload: Workload,
        folder: str,
        dtype: str,
        device: torch.device,
        batches: int | None = None,
    ) -> None:
        small = dataclasses.replace(workload, sequences=PARITY_SEQUENCES, longest=PARITY_LONGEST)
        seeds = range(workload.seed, workload.seed + (batches or PARITY_BATCHES))
        self.batches = [dataclasses.replace(small, seed=seed).examples() for seed in seeds]
        self.folder, self.dtype, self.device = folder, dtype, device

    def ours(self) -> Parity:
        """Of our training step."""
        model = self._names.to(self.device)

        def tensors(examples: Examples) -> dict[str, Tensor]:
            batches, dtype = [packed(examples)], DTYPES[self.dtype]
            result = accumulate(model, batches, device=self.device, dtype=dtype)
            found = {"loss": result.sums["masked_lm_loss"] / result.targets.masked}
            return found | {name: _taken(p) for name, p in model.named_parameters()}

        return self._judged(tensors)

    def flattened(self) -> Parity:
        """Of transformers on one row of all sequences."""
        peer = peers.bert_for_masked_lm(self.folder, self.device)

        def tensors(examples: Examples) -> dict[str, Tensor]:
            batch = peers.flattened(examples, self.device)
            return self._tensors(peer, batch, autocast(self.device, DTYPES[self.dtype]))

        return self._judged(tensors)

    def _judged(self, tensors: Callable[[Examples], dict[str, Tensor]]) -> Parity:
        parity = Parity(DTYPES[self.dtype])
        for examples, (peer, oracle) in zip(self.batches, self._held_to, strict=True):
            parity.add(tensors(examples), peer, oracle)
        return parity

    @functools.cached_property
    def _held_to(self) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Of every batch, transformers' tensors in the dtype and in fp64."""
        peer = peers.bert_for_masked_lm(self.folder, self.device)
        oracle = peers.bert_for_masked_lm(self.folder, self.device).double()
        found = []
        for examples in self.batches:
            batch = peers.padded(examples, self.device)
            precision = autocast(self.device, DTYPES[self.dtype])
            theirs = self._tensors(peer, batch, precision)
            found.append((theirs, self._tensors(oracle, batch, contextlib.nullcontext())))
        return found

    @functools.cached_property
    def _names(self) -> Model:
        return BertForMaskedLM.from_pretrained(self.folder)

    def _tensors(
        self,
        peer: nn.Module,
        batch: dict[str, Tensor],
        precision: contextlib.AbstractContextManager[Any],
    ) -> dict[str, Tensor]:
        with precision:
            loss = peer(**batch).loss
        loss.backward()
        gradients = peers.gradients_by_our_names(peer, self._names)
        peer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **gradients}


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient
