"""Two programs trained on the same real text, step by step on the same sequences.

A step of the case is one optimiser step on the next batch, which both sides are given: ours packs
it, transformers pads it. Same weights at the start, no dropout, so that losses stay together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import peers
from fastbert.bench.step_sides import BETAS, CLIP_NORM, DTYPES, EPS, WEIGHT_DECAY
from fastbert.bench.timing import Step
from fastbert.models import Model
from fastbert.packing import Examples
from fastbert.training.loop import autocast
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import TrainingStep

EVALUATED = 32
Pad = Callable[[Examples, torch.device], dict[str, Tensor]]


class Ours:
    """Our model in training.

    Args:
        load: gives the model.
        batches: of examples, taken in turn, over and over.
        dtype: of matrix products.
        learning_rate: constant.
        device: that computes.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        batches: Sequence[Examples],
        dtype: str,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        self._load, self._batches = load, batches
        self._dtype, self._learning_rate, self._device = dtype, learning_rate, device

    @functools.cached_property
    def model(self) -> Model:
        return self._load().to(self._device)

    def step(self) -> Step:
        model = self.model.train()
        optimizers = Optimizers(
            model,
            "adamw",
            learning_rate=self._learning_rate,
            weight_decay=WEIGHT_DECAY,
            beta2=BETAS[1],
        )
        training = TrainingStep(model, optimizers, DTYPES[self._dtype], CLIP_NORM)
        batches = itertools.cycle(self._batches)

        def take() -> None:
            examples = next(batches)
            training([examples.batch(range(len(examples)))], None, 1.0)

        return take

    def outputs(self, examples: Examples) -> Iterator[tuple[Tensor, Examples]]:
        """Logits of every part of the examples: [sequences, labels], or [tokens, vocabulary]."""
        self.model.eval()
        for part in parts_of(examples):
            # without labels a model gives logits, and no loss
            bare = dataclasses.replace(
                part, masked_positions=None, labels=None, sequence_labels=None
            )
            with torch.no_grad(), autocast(self._device, DTYPES[self._dtype]):
                batch = bare.batch(range(len(bare))).to(self._device)
                yield self.model(batch).logits, part


class Theirs:
    """transformers' model in training, on padded batches."""

    def __init__(
        self,
        load: Callable[[], nn.Module],
        pad: Pad,
        batches: Sequence[Examples],
        dtype: str,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        self._load, self._pad, self._batches = load, pad, batches
        self._dtype, self._learning_rate, self._device = dtype, learning_rate, device

    @functools.cached_property
    def model(self) -> nn.Module:
        return self._load().to(self._device)

    def step(self) -> Step:
        model = self.model.train()
        groups = peers.parameter_groups(model, WEIGHT_DECAY)
        optimizer = torch.optim.AdamW(
            groups, lr=self._learning_rate, betas=BETAS, eps=EPS, fused=True
        )
        batches = itertools.cycle(self._batches)

        def take() -> None:
            batch = self._pad(next(batches), self._device)
            with autocast(self._device, DTYPES[self._dtype]):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return take

    def outputs(self, examples: Examples) -> Iterator[tuple[Tensor, Examples]]:
        """Logits of every part of the examples, padding included."""
        self.model.eval()
        for part in parts_of(examples):
            batch = self._pad(part, self._device)
            batch.pop("labels")
            with torch.no_grad(), autocast(self._device, DTYPES[self._dtype]):
                yield self.model(**batch).logits, part


def parts_of(examples: Examples) -> Iterator[Examples]:
    """So few sequences at a time that a vocabulary's logits fit."""
    for start in range(0, len(examples), EVALUATED):
        yield select(examples, range(start, min(start + EVALUATED, len(examples))))


def select(examples: Examples, chosen: Sequence[int]) -> Examples:
    """Some of the sequences, with masked tokens and labels."""
    bounds = examples.cu_seqlens
    rows = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in chosen])
    made = Examples.from_lists(
        [examples.input_ids[bounds[n] : bounds[n + 1]].tolist() for n in chosen]
    )
    if examples.sequence_labels is not None:
        made.sequence_labels = examples.sequence_labels[np.asarray(chosen)]
    if examples.masked_positions is not None and examples.labels is not None:
        # where each token of the stream lies in the part, -1 where it is left out
        place = np.full(len(examples.input_ids), -1)
        place[rows] = np.arange(len(rows))
        kept = place[examples.masked_positions] >= 0
        made.masked_positions = place[examples.masked_positions[kept]]
        made.labels = examples.labels[kept]
    return made
