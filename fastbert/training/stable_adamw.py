"""StableAdamW: AdamW whose step shrinks where the second moment lags behind the gradient.

Wortsman et al. 2023, arXiv:2304.13013, algorithm 2 (update clipping of Shazeer and Stern 2018,
arXiv:1804.04235, in place of clipping gradients).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fastbert.training.moments import Moments, Whole


class StableAdamW(Moments):
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
        surprise = (gradient.square() / square.clamp(min=group["eps"] ** 2)).sum()
        surprise = whole.summed(surprise) / whole.numel
        rate = group["lr"] / surprise.sqrt().clamp(min=1.0)
        update = mean.div_(square.sqrt_().add_(group["eps"]))
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter -= rate * update
