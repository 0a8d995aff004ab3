"""Muon: momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.training.shards import gathered, part, part_of

# of the quintic that pushes singular values towards one (Jordan et al. 2024)
COEFFICIENTS, ITERATIONS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), its updates as large as AdamW's (arXiv:2502.16982).

    The numbers of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, but the learning rate may
    be a tensor that no step reads back: a CUDA graph can hold it. Every rank gathers
    matrices that lie in shards, to make them orthogonal.

    Args:
        parameters: matrices, or groups of them.
        lr: peak learning rate; later a scalar tensor beside the parameters.
        weight_decay: decoupled.
        momentum: share of the old momentum kept, with Nesterov's look ahead.

    Attributes:
        grad_scale: scalar tensor by which gradients are divided; None for 1.
        found_inf: scalar tensor, 1 where this step is to change nothing; None for never.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient, weight = part(parameter.grad), part(parameter)
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = part(state["momentum_buffer"])
        smoothed = torch.lerp(buffer, gradient, 1.0 - group["momentum"])
        update = gathered(gradient.lerp_(smoothed, group["momentum"]), parameter)
        direction = part_of(orthogonalised(update), parameter)
        rate = group["lr"]
        adjusted = rate * (0.2 * math.sqrt(max(parameter.shape)))
        # widened first: a scalar tensor would not widen the product
        change = direction.to(parameter.dtype) * adjusted
        moved = weight * (1.0 - rate * group["weight_decay"]) - change
        if self.found_inf is not None:
            skip = self.found_inf > 0
            smoothed = torch.where(skip, buffer, smoothed)
            moved = torch.where(skip, weight, moved)
        buffer.copy_(smoothed)
        weight.copy_(moved)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix with singular values near one, in bf16: Newton-Schulz (Jordan et al. 2024)."""
    a, b, c = COEFFICIENTS
    # the smaller Gram matrix
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
