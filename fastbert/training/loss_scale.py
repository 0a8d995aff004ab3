"""Dynamic loss scaling for fp16 (Micikevicius et al. 2017, arXiv:1710.03740), on the device."""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF = 2.0**16, 2.0, 0.5
# steps without an overflow after which the scale is tried one size larger
GROWTH_INTERVAL = 2000


class LossScale:
    """A factor that keeps fp16 gradients above the smallest numbers; nobody waits to read it.

    Attributes:
        scale: scalar fp32.
        good_steps: scalar int32, steps since the scale last changed.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Halve the scale after an overflow (`found_inf` [1] fp32 is 1), double it now and then."""
        torch._amp_update_scale_(
            self.scale, self.good_steps, found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Both numbers by name, for a checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises:
            ValueError: other names than those.
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"loss scale: expected {sorted(own)}, found {sorted(tensors)}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
