"""A CUDA graph in play: records what torch does on a CPU, and does it again on the same memory.

What a real capture cannot hold fails here too: reading a tensor on the host, and constants that the
host would have to send.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert.kernels import launch, reference_cross_entropy

# reading on the host, or shapes that follow from values
REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "is_pinned", "equal")


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For modules that import it: operators ask nothing of their tensors, eager or captured."""
    monkeypatch.setattr(reference_cross_entropy, "may_be_read", lambda tensor: False)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, function: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"capture: {name} asks the device, or needs the host")
        options = options or {}
        results = function(*arguments, **options)

        def again() -> None:
            for old, new in zip(
                tree_leaves(results), tree_leaves(function(*arguments, **options)), strict=True
            ):
                # views and what is changed in place lie in the memory already
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(again)
        return results


class SimulatedGraph:
    """As `fastbert.training.step.CudaGraphs`.

    Attributes:
        kept: tensors that outlive a step; a test names them, since recording, unlike capture, does
            the work once and must take it back.
    """

    kept: ClassVar[list[Tensor]] = []

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record `work`, which changes nothing that is kept."""
        calls: list[Callable[[], None]] = []
        before = [tensor.detach().clone() for tensor in self.kept]
        original = launch.run

        def run(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
            def again() -> None:
                original(kernel, grid, *arguments, **options)

            with torch.utils._python_dispatch._disable_current_modes():
                again()
            calls.append(again)

        launch.run = run  # type: ignore[assignment]
        try:
            with _Recorder(calls):
                results = work()
        finally:
            launch.run = original
            with torch.no_grad():
                for tensor, value in zip(self.kept, before, strict=True):
                    tensor.copy_(value)

        def replay() -> None:
            with torch.no_grad():
                for call in calls:
                    call()

        return replay, results

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing is beside a CPU."""
        yield
