"""The parameters of one LayerNorm."""

from __future__ import annotations

import torch
from torch import nn


class Norm(nn.Module):
    """The weight and bias of one LayerNorm; without a bias, zeros that are no parameter."""

    def __init__(self, hidden_size: int, *, has_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(hidden_size))
        else:
            self.register_buffer("bias", torch.zeros(hidden_size), persistent=False)
