"""Where kernels are tested: on a GPU, or under Triton's interpreter in a process of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from fastbert.kernels import launch, ops

ON_GPU = torch.cuda.is_available() and not launch.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# test_kernels.py starts the process that has TRITON_INTERPRET=1; make gpu-test takes the marker
runs_kernels = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(
        not launch.INTERPRETED, reason="run by test_kernels.py, with TRITON_INTERPRET=1"
    )
)
few_examples = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def by(backend: str, operator: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
    """The operator with its constants, on one backend; takes its tensors by name."""

    def call(**tensors: Tensor) -> Any:
        with ops.use_backend(backend):
            return operator(**tensors, **constants)

    return functools.wraps(operator)(call)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in fp64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for a GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
