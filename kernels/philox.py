"""Where dropout's random numbers come from.

A draw is named by logical coordinates: seed, optimiser step, micro-batch, layer, call site.
Training on a CPU seeds a torch generator from them: fast, repeatable, resumable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rng:
    """Names one draw of random numbers; hand a different one to every call site.

    Attributes:
        seed: of the whole run.
        step: optimiser step.
        micro_batch: micro-batch within the step.
        layer: encoder layer; 0 is the embedding.
        site: call site within the layer.
    """

    seed: int
    step: int = 0
    micro_batch: int = 0
    layer: int = 0
    site: int = 0

    def at(self, layer: int, site: int = 0) -> Rng:
        """The same step's numbers for another layer and call site."""
        return replace(self, layer=layer, site=site)

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by all five coordinates."""
        state = 0
        for coordinate in (self.seed, self.step, self.micro_batch, self.layer, self.site):
            state = _mix(state ^ (coordinate & _MASK))
        return torch.Generator().manual_seed(state & ((1 << 63) - 1))


def keep_mask(shape: tuple[int, ...], dropout_p: float, rng: Rng, like: Tensor) -> Tensor:
    """0 with probability `dropout_p`, else 1 / (1 - dropout_p): `shape`, dtype of `like`."""
    mask = torch.empty(shape, dtype=torch.float32)
    mask.bernoulli_(1.0 - dropout_p, generator=rng.generator())
    return mask.mul_(1.0 / (1.0 - dropout_p)).to(device=like.device, dtype=like.dtype)


def _mix(value: int) -> int:
    # splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit reaches every output bit
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
