"""One padded call's plan: which rows are real, where sequences lie, and what dropout draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels.ops import Layout, Rng
from fastbert.packing import unpack


@dataclass
class Packed:
    """One forward pass's batch; layers find it where they expect the attention mask.

    Attributes:
        layout: of the packed stream.
        rows: [tokens] int64 into the flattened padded batch; None where nothing is padding.
        shape: (batch, length).
        rng: names the dropout draws; None for no dropout.
        steps: layers taken so far, where several share their weights.
        tables: rotary cosines and sines by layer type, [length, head_dim // 2] each.
    """

    layout: Layout
    rows: Tensor | None
    shape: tuple[int, int]
    rng: Rng | None
    steps: int = 0
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device, *, training: bool
    ) -> Packed:
        """The plan of a padded batch; asks the device once where there is a mask.

        Args:
            mask: [batch, length], nonzero at real tokens; None where all are real.
            shape: (batch, length).
            device: of the tokens.
            training: draw a seed for dropout from torch's generator, as transformers' own does.
        """
        rows = None
        if mask is None:
            lengths = torch.full((shape[0],), shape[1])
        else:
            real = (mask != 0).to(device)
            lengths = real.sum(dim=1).cpu()
            tokens = int(lengths.sum())
            if tokens < real.numel():
                # the count is known, so that this does not ask the device again
                rows = torch.nonzero_static(real.flatten(), size=tokens).squeeze(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        layout = Layout(cu_seqlens, int(cu_seqlens[-1]), shape[1])
        rng = Rng(int(torch.randint(1 << 62, ()))) if training else None
        if device.type != "cpu":
            layout = layout.to(device)
            rng = rng.on(device) if rng else None
        return cls(layout, rows, shape, rng)

    def positions(self) -> Tensor:
        """[tokens] int64, each token's column of the padded batch."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(self.layout.capacity, device=self.layout.cu_seqlens.device)
        return rows % self.shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] -> [tokens, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def unpack(self, states: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, length, ...], zeros at padding."""
        if self.rows is None:
            return states.unflatten(0, self.shape)
        return unpack(states, self.rows, self.shape)
