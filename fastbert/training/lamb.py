"""LAMB: Adam whose step is as long, relative to each matrix, as the learning rate says.

You et al. 2020, arXiv:1904.00962, algorithm 2. As in the published code, what has no weight decay
(biases and norms) takes the plain step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.training.moments import Moments, Whole


class Lamb(Moments):
    """LAMB with bias correction.

    Args:
        params: parameters, or groups of them.
        lr: of the trust-scaled step.
        betas: of the two moments.
        eps: added to the root of the second.
        weight_decay: added to the step, before its length is taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _move(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        whole: Whole,
    ) -> None:
        update = mean.div_(square.sqrt_().add_(group["eps"]))
        rate = group["lr"]
        if group["weight_decay"]:
            update += group["weight_decay"] * parameter
            squares = torch.stack([parameter.square().sum(), update.square().sum()])
            length, stride = whole.summed(squares).sqrt().unbind()
            trust = torch.where((length > 0) & (stride > 0), length / stride, 1.0)
            rate = rate * trust
        parameter -= rate * update
