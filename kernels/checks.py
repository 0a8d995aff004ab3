"""What every public operator asks of its arguments before work begins, and autocast's part in it.

Errors say operator, rule and received value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert.kernels.philox import Rng, check_rows

ACTIVATIONS = ("gelu", "gelu_new")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_WIDTH, MAX_WIDTH = 32, 8192

# state, sequence ids, positions, layer, site, dropout_p: what a kernel needs for its mask
Draw = tuple[Tensor | None, Tensor | None, Tensor | None, int, int, float]
NO_DRAW: Draw = (None, None, None, 0, 0, 0.0)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for the tensor's device, else the tensor's own."""
    device = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, nothing is cast behind an operator's back."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)  # type: ignore[no-any-return]
    return contextlib.nullcontext()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_dropout(operator: str, dropout_p: float, rng: Rng | None) -> None:
    """Raise ValueError where the probability is none, or there is nothing to draw from."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and rng is None:
        raise ValueError(f"{operator}: dropout_p {dropout_p} needs an rng")


def check_width(operator: str, x: Tensor, width: int) -> None:
    """Raise ValueError where `x` is not [rows, width]."""
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{operator}: x must be [rows, {width}], got {list(x.shape)}")


def check_shapes(operator: str, *wanted: tuple[str, Tensor | None, Sequence[int]]) -> None:
    """Raise ValueError at the first (name, tensor, shape) that does not fit; None always does."""
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{operator}: {name} must be {list(shape)}, got {list(tensor.shape)}")


def check_activation(operator: str, activation: str) -> None:
    """Raise ValueError for an activation that no kernel knows."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{operator}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def check_kernel_width(operator: str, width: int) -> None:
    """Raise ValueError for rows that do not fit the registers of the norm kernels."""
    if not MIN_WIDTH <= width <= MAX_WIDTH:
        raise ValueError(f"{operator}: width must be {MIN_WIDTH} to {MAX_WIDTH}, got {width}")


def check_kernel_inputs(operator: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for devices, dtypes and strides that kernels do not take."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{operator}: {name} must be on {device}, got {tensor.device}")
        if tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(
                f"{operator}: {name} must be float32, float16 or bfloat16 for Triton, got "
                f"{tensor.dtype}; use_backend('reference') takes float64"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{operator}: {name} must be contiguous in its last dimension, got strides "
                f"{list(tensor.stride())}; call .contiguous()"
            )


def draw(operator: str, x: Tensor, dropout_p: float, rng: Rng | None) -> Draw:
    """What a kernel over the rows of `x` needs for its mask.

    Raises:
        ValueError: the rng's coordinates are for another number of rows.
    """
    if dropout_p == 0.0 or rng is None:
        return NO_DRAW
    check_rows(operator, rng, x.shape[0])
    state = rng.device_state(x.device)
    return state, *rng.coordinates(), rng.layer, rng.site, dropout_p
