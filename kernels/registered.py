"""What the autograd files share: launchers as torch.library operators, and manners of backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import launch

if launch.INTERPRETED:
    from fastbert.kernels import interpreter

    interpreter.repair()


class Registered:
    """A launcher: itself in eager code, its torch.library operator in compiled code."""

    def __init__(self, launcher: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.operator = torch.library.custom_op(
            f"fastbert::{launcher.__name__}", launcher, mutates_args=()
        )

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.operator(*arguments)
        return self.launcher(*arguments)


def row_contiguous(gradient: Tensor) -> Tensor:
    """The gradient with its rows in memory, which an expanded one, as a sum's, has not."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def refuse_second_derivative(operator: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operator}: Triton kernels have no second derivative (create_graph=True): "
            "run the forward pass under fastbert.kernels.ops.use_backend('reference')"
        )
