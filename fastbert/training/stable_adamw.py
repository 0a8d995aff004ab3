"""StableAdamW: AdamW whose step shrinks where the second moment lags behind the gradient.

Wortsman et al. 2023, arXiv:2304.13013, algorithm 2 (update clipping of Shazeer and Stern 2018,
arXiv:1804.04235, in place of clipping gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.training.gated import gated_gradients, keep_where_finite


class StableAdamW(torch.optim.Optimizer):
    """AdamW with update clipping, tensor by tensor.

    Args:
        params: parameters, or groups of them.
        lr: before clipping.
        betas: of the two moments, debiased.
        eps: added to the root of the second.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
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
                    moment = second / (1 - beta2**step)
                    surprise = (gradient.square() / moment.clamp(min=group["eps"] ** 2)).mean()
                    rate = group["lr"] / surprise.sqrt().clamp(min=1.0)
                    update = first / (1 - beta1**step) / moment.sqrt_().add_(group["eps"])
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter -= rate * update
        return loss
