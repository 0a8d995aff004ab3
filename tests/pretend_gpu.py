"""A machine that says it has a GPU, for code that runs on one alone: its tensors lie on the CPU.

Under TRITON_INTERPRET=1 kernels run on them. Times and memory mean nothing; what is seen is that
the code goes through.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

NAME = "A Pretended GPU"


class OnTheCpu(TorchFunctionMode):
    """Takes "cuda" for "cpu" in every call of torch."""

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is torch.device:
            return function(*arguments, **(options or {}))
        words = {name: _moved(value) for name, value in (options or {}).items()}
        return function(*map(_moved, arguments), **words)


def _moved(value: Any) -> Any:
    is_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_gpu else value


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the test, torch sees a GPU."""
    import triton.testing

    properties = types.SimpleNamespace(
        multi_processor_count=4, major=9, minor=0, total_memory=1 << 34, name=NAME
    )
    said = {
        "is_available": True,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "synchronize": None,
        "memory_allocated": 1 << 20,
        "max_memory_allocated": 1 << 21,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "is_current_stream_capturing": False,
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, _saying(getattr(torch.cuda, name), value))
    # page-locked memory is a GPU's
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(triton.testing, "do_bench", _once(triton.testing.do_bench))
    monkeypatch.setattr(torch, "compile", _uncompiled(torch.compile))
    with OnTheCpu():
        yield


def _saying(real: Callable[..., Any], value: Any) -> Callable[..., Any]:
    def said(*arguments: Any, **options: Any) -> Any:
        # a call that the real function would refuse fails here too
        inspect.signature(real).bind(*arguments, **options)
        return value

    return said


def _once(real: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> float:
        inspect.signature(real).bind(*arguments, **options)
        arguments[0]()
        return 0.5

    return timed


def _uncompiled(real: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        # names of modes and backends are checked, nothing is compiled until the first call
        real(function, **options)
        return function

    return compiled
