"""Gradients as torch's fused optimisers take them: scaled, and left alone where not finite.

Of parameters in shards, gradients and state are this rank's parts.

An optimiser may carry `grad_scale`, what gradients are divided by, and `found_inf`, 1 where they
are not finite; both scalar tensors, so that nothing asks the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastbert.training.shards import part


def gated_gradients(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of the group that has a gradient, with the gradient divided."""
    scale = getattr(optimizer, "grad_scale", None)
    for parameter in group["params"]:
        if parameter.grad is not None:
            gradient = part(parameter.grad)
            yield parameter, gradient if scale is None else gradient / scale


@contextmanager
def keep_where_finite(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]
) -> Iterator[None]:
    """Undo what happens inside to a parameter and its state where gradients are not finite."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        yield
        return
    tensors = [part(tensor) for tensor in (parameter, *state.values())]
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(found > 0, old, tensor))
