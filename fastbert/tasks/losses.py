"""Losses over packed outputs: sums, to be divided by the targets of the whole optimiser step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.packing import IGNORE_INDEX
from fastbert.segments import owners, segment_sum


class Loss(NamedTuple):
    """Sums over targets.

    Attributes:
        total: scalar with a graph.
        correct: scalar, how many targets are met.
    """

    total: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Shaping:
    """What a run changes about its task's loss.

    Attributes:
        class_weights: [classes] float32 where the model is, mean 1 over the training examples;
            None for equal ones.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016).
    """

    class_weights: Tensor | None = None
    label_smoothing: float = 0.0


def at_least_one(targets: int | Tensor) -> int | Tensor:
    """What sums are divided by; on the device it is at least 1 already."""
    return targets if isinstance(targets, Tensor) else max(targets, 1)


def widened(values: Tensor) -> Tensor:
    """In fp32, or wider where it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_loss(logits: Tensor, labels: Tensor, shaping: Shaping) -> Loss:
    """Cross-entropy of [rows, classes] logits against [rows] labels, -100 for none."""
    loss = F.cross_entropy(
        widened(logits),
        labels,
        weight=shaping.class_weights,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=shaping.label_smoothing,
    )
    return Loss(loss, (logits.argmax(dim=-1) == labels).sum())


def binary_loss(logits: Tensor, values: Tensor, shaping: Shaping) -> Loss:
    """Mean over labels of binary cross-entropies, [rows, labels] logits against 0 and 1."""
    smooth = shaping.label_smoothing
    target = values * (1.0 - smooth) + 0.5 * smooth
    losses = F.binary_cross_entropy_with_logits(
        widened(logits),
        target.to(widened(logits).dtype),
        pos_weight=shaping.class_weights,
        reduction="none",
    )
    right = ((logits > 0) == (values > 0.5)).all(dim=-1)
    return Loss(losses.mean(dim=-1).sum(), right.sum())


def squared_loss(numbers: Tensor, values: Tensor, right_within: float) -> Loss:
    """Squared errors of [rows] numbers; met where they are off by less than `right_within`."""
    errors = widened(numbers) - values
    return Loss(errors.square().sum(), (errors.abs() < right_within).sum())


def pool_units(values: Tensor, cu_units: Tensor, how: str) -> Tensor:
    """[sequences, numbers] -> [units, numbers]: the mean or the greatest over a unit."""
    counts = cu_units[1:] - cu_units[:-1]
    if len(counts) == len(values):
        return values
    owner = owners(cu_units, len(values))
    if how == "mean":
        return segment_sum(widened(values), cu_units, owner) / counts[:, None]
    index = owner[:, None].expand_as(values)
    empty = values.new_zeros((len(counts), values.shape[1]))
    return empty.scatter_reduce(0, index, values, "amax", include_self=False)


def choice_loss(scores: Tensor, cu_units: Tensor, labels: Tensor, shaping: Shaping) -> Loss:
    """Cross-entropy among the choices of each unit, which may have any number of them.

    Args:
        scores: [sequences], one a choice; what is past the last unit may hold anything.
        cu_units: [units + 1].
        labels: [units], which choice is right.
        shaping: label smoothing spreads over the unit's own choices.
    """
    units = len(cu_units) - 1
    owner = owners(cu_units, len(scores))
    wide = widened(scores).masked_fill(owner == units, 0.0)
    top = wide.detach().new_full((units + 1,), float("-inf"))
    top = top.scatter_reduce(0, owner, wide.detach(), "amax")
    total = segment_sum((wide - top[owner]).exp(), cu_units, owner)
    top = top[:units]
    log_sum = total.log() + top
    right = wide[cu_units[:-1] + labels]
    smooth = shaping.label_smoothing
    counts = (cu_units[1:] - cu_units[:-1]).to(wide.dtype)
    mean = segment_sum(wide, cu_units, owner) / counts
    target = (1.0 - smooth) * right + smooth * mean if smooth else right
    return Loss((log_sum - target).sum(), (right.detach() == top).sum())
