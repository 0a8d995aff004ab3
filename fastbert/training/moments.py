"""What LAMB and StableAdamW share: Adam's two moments (Kingma and Ba 2014, arXiv:1412.6980)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastbert.training.gated import gated_gradients, keep_where_finite
from fastbert.training.shards import part, summed


class Whole:
    """A parameter that may lie in shards, as a whole.

    Attributes:
        numel: elements of all parts.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self.numel = parameter.numel()

    def summed(self, value: Tensor) -> Tensor:
        """What each part's rank has, added up."""
        return summed(value, self._parameter)


class Moments(torch.optim.Optimizer):
    """An optimiser with Adam's two moments; a subclass says what `_move` makes of them.

    A parameter in shards is moved part by part; a subclass adds up over all parts what it needs.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as the subclass says.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
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
                    first, second = part(state["exp_avg"]), part(state["exp_avg_sq"])
                    step = state["step"]
                    first.lerp_(gradient, 1 - beta1)
                    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    mean, square = first / (1 - beta1**step), second / (1 - beta2**step)
                    self._move(
                        group,
                        part(parameter),
                        gradient,
                        mean,
                        square,
                        Whole(parameter),
                    )
        return loss

    def _move(
        self,
        group: dict[str, Any],
        parameter: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        whole: Whole,
    ) -> None:
        """Update the parameter in place from its debiased moments, which are free to overwrite."""
        raise NotImplementedError
