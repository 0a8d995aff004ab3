"""Dynamic int8 quantisation for inference on CPUs: weights once, activations in every call.

Products of the encoder's layers are made in int8 with torch's own operators: a scale a row of the
weight, one scale and zero point a call for the activations (Jacob et al. 2018, arXiv:1712.05877).
This is not exact: `fastbert bench encode` shows what it costs and what it gains.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Int8Linear(nn.Module):
    """A projection whose product is made in int8; its bias is added in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            # the packed form has no constructor but this one, whatever torch plans for it
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
            bias = None if linear.bias is None else linear.bias.detach().float()
            self.packed = torch.ops.quantized.linear_prepack(rounded, bias)
        # without VNNI two products of 8 bits are added in 16, which only 7 bits never overflow
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of x."""
        wide = x.float().contiguous()
        output: Tensor = torch.ops.quantized.linear_dynamic(wide, self.packed, self.reduce_range)
        return output.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantize(model: M) -> M:
    """Put int8 projections in the place of those of all encoder layers, in this model.

    Args:
        model: of `fastbert.models`, on a CPU, for inference; it can neither be trained nor saved
            afterwards.

    Returns:
        The same model.

    Raises:
        ValueError: the model is on another device, or holds no encoder layers.
    """
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if layers is None:
        raise ValueError(
            f"quantize: expected a model of fastbert.models, got {type(model).__name__}"
        )
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"quantize: int8 products are made on CPUs, the model is on {device}")
    for layer in layers:
        for name, child in list(layer.named_children()):
            if type(child) is nn.Linear:
                setattr(layer, name, Int8Linear(child))
    return model.eval()
