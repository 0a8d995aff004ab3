"""One padded call's plan: which rows are real, where sequences lie, and what dropout draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import ops
from fastbert.kernels.ops import Layout, Rng
from fastbert.packing import unpack


@dataclass
class Packed:
    """One forward pass's batch; layers find it where they expect the attention mask.

    Attributes:
        layout: of the packed stream.
        rows: [tokens] int64 into the flattened padded batch; None where nothing is padding.
        shape: (batch, length).
        device: of the tokens.
        starts_late: whether some sequence has padding before its first token.
        has_holes: whether some sequence has padding between its tokens.
        windowed: whether the mask is for layers that see a window alone.
        rng: names the dropout draws; None until one is asked for.
        steps: layers taken so far, where several share their weights.
        tables: rotary cosines and sines by layer type, [length, head_dim // 2] each.
    """

    layout: Layout
    rows: Tensor | None
    shape: tuple[int, int]
    device: torch.device
    starts_late: bool = False
    has_holes: bool = False
    windowed: bool = False
    rng: Rng | None = None
    steps: int = 0
    tables: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Packed:
        """The plan of a padded batch; asks the device once where there is a mask.

        Args:
            mask: [batch, length], nonzero at real tokens; None where all are real.
            shape: (batch, length).
            device: of the tokens.

        Raises:
            ValueError: a mask of another shape.
        """
        rows, starts_late, has_holes = None, False, False
        if mask is None:
            lengths = torch.full((shape[0],), shape[1])
        else:
            if tuple(mask.shape) != shape:
                raise ValueError(
                    f"attention_mask must be [batch, length], here {list(shape)}, "
                    f"got {list(mask.shape)}"
                )
            real = (mask != 0).to(device)
            starts = real[:, 1:] & ~real[:, :-1]
            counts = torch.stack([real.sum(dim=1), real[:, 0].long(), starts.sum(dim=1)]).cpu()
            lengths, at_first, later = counts.unbind()
            starts_late = bool(((lengths > 0) & (at_first == 0)).any())
            has_holes = bool((at_first + later > 1).any())
            tokens = int(lengths.sum())
            if tokens < real.numel():
                # the count is known, so that this does not ask the device again
                rows = torch.nonzero_static(real.flatten(), size=tokens).squeeze(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        layout = Layout(cu_seqlens, int(cu_seqlens[-1]), shape[1])
        if device.type != "cpu":
            layout = layout.to(device, non_blocking=True)
        return cls(layout, rows, shape, device, starts_late, has_holes)

    def draws(self, dropout_p: float) -> Rng | None:
        """Names dropout's draws; None where nothing is dropped.

        The seed is drawn from torch's generator, as transformers' own dropout is.
        """
        if dropout_p and self.rng is None:
            rng = Rng(int(torch.randint(1 << 62, ())))
            self.rng = rng if self.device.type == "cpu" else rng.on(self.device)
        return self.rng if dropout_p else None

    def attention_draws(self, dropout_p: float, heads: int) -> Rng | None:
        """`draws`, with the words of attention's masks: drawn once for all layers."""
        rng = self.draws(dropout_p)
        if rng is not None and rng.words is None:
            rng = ops.with_attention_words(rng, self.layout.capacity, heads, self.device)
            self.rng = rng
        return rng

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
