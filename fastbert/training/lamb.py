"""LAMB: Adam whose step is as long, relative to each matrix, as the learning rate says.

You et al. 2020, arXiv:1904.00962, algorithm 2. As in the published code, what has no weight decay
(biases and norms) takes the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.training.gated import gated_gradients, keep_where_finite


class Lamb(torch.optim.Optimizer):
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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter, gradient in gated_gradients(self, group):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                with keep_where_finite(self, parameter, state):
                    state["step"] += 1
                    first, second, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
                    first.lerp_(gradient, 1 - beta1)
                    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    update = first / (1 - beta1**step)
                    update /= (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
                    rate = group["lr"]
                    if group["weight_decay"]:
                        update += group["weight_decay"] * parameter
                        length, stride = parameter.norm(), update.norm()
                        trust = torch.where((length > 0) & (stride > 0), length / stride, 1.0)
                        rate = rate * trust
                    parameter -= rate * update
        return loss
