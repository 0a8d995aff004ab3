"""Copies from the host to where kernels run, that neither side waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str, *, non_blocking: bool = False) -> Tensor:
    """The tensor on `device`; a copy that nobody waits for leaves from page-locked memory.

    Out of other memory a GPU copies piece by piece, and the host waits. Page-locked memory is asked
    for by the thread that sends: from another one it would disturb a capture.
    """
    if non_blocking:
        tensor = _page_locked(tensor, torch.device(device))
    return tensor.to(device, non_blocking=non_blocking)


def overwrite(target: Tensor, source: Tensor) -> None:
    """Write `source` into the target's memory, as `sent` without waiting."""
    target.copy_(_page_locked(source, target.device), non_blocking=True)


def _page_locked(tensor: Tensor, device: torch.device) -> Tensor:
    leaves_the_host = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if leaves_the_host else tensor
