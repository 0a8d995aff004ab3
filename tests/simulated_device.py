"""A GPU in play: tensors that say they are on "cuda" lie on the CPU, and are told from the others.

What a GPU would refuse fails here too: tensors of both sides in one operator or kernel, grids that
are empty or too large. What makes the host wait for a device is noted. Kernels are not run: what
they would have written is left as it was, so that values mean nothing, and code that follows them
must not exist.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastbert.kernels import launch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# shapes, or numbers on the host, that follow from values on the device
ASK = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
}
# take their indices from either side, and copy them over
TAKE_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAKE = {"empty", "zeros", "ones", "full", "arange", "scalar_tensor", "empty_strided", "linspace"}
MOST_BLOCKS = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)


class SimulatedDevice:
    """Which memory is the device's, what was launched there, and where the host waited.

    Attributes:
        waits: what made the host wait, as "what, at file:line".
        launches: name, grid and what Triton would compile anew for, of every kernel.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        # a weak reference keeps the address from being given out again
        self._labels: dict[int, tuple[StorageWeakRef, str]] = {}
        # where operators inside of the call of torch in hand make their tensors
        self.makes_here = [False]

    def label(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()
        self._labels[storage._cdata] = (StorageWeakRef(storage), label)

    def holds(self, tensor: Tensor) -> bool:
        return self._label_of(tensor) == "gpu"

    def is_pinned(self, tensor: Tensor) -> bool:
        return self._label_of(tensor) == "pinned"

    def _label_of(self, tensor: Tensor) -> str | None:
        return self._labels.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def waited(self, reason: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        frames = [f for f in frames if f.filename != __file__]
        place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
        self.waits.append(f"{reason}, at {place}")

    def sent(self, tensor: Tensor, *, here: bool, non_blocking: bool) -> Tensor:
        """A copy on the other side."""
        copied = tensor.clone()
        self.label(copied, "gpu" if here else "cpu")
        if not (here and non_blocking and self.is_pinned(tensor)):
            self.waited("a copy to the device" if here else "a copy from the device")
        return copied

    def launched(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        launch: launch.Launch,
        **constants: Any,
    ) -> None:
        """In place of `fastbert.kernels.launch.run`."""
        name = kernel.fn.__name__
        for size, most in zip(grid, MOST_BLOCKS, strict=False):
            assert 0 < size <= most, f"{name}: a grid of {grid}"
        assert isinstance(arguments[0], Tensor), f"{name}: the first argument names the device"
        names = [parameter.name for parameter in kernel.params]
        for argument, own in zip(arguments, names, strict=False):
            if isinstance(argument, Tensor):
                assert self.holds(argument), f"{name}: {own} is on the CPU"
        known = [
            _specialised(argument, parameter)
            for argument, parameter in zip(arguments, kernel.params, strict=False)
        ]
        settings = (launch, *sorted(constants.items()))
        self.launches.append((name, grid, (*known, *settings)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _specialised(argument: Any, parameter: Any) -> Any:
    """What Triton compiles a kernel for: dtypes, and whether 16 divides numbers and addresses."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if parameter.do_not_specialize or argument is None:
        return argument is None, abs(argument or 0) < 1 << 31
    return argument == 1, argument % 16 == 0, abs(argument) < 1 << 31


class _Calls(TorchFunctionMode):
    """What is asked of "cuda" by name."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options, device = dict(options or {}), self.device
        own = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
        here = own is not None and device.holds(own)
        if own is not None and function in _GETTERS:
            return _GETTERS[function] if here else function(own)
        if own is not None and function in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(own, here, function, arguments[1:], options)
        if function is Tensor.pin_memory:
            assert not here, "pin_memory: on the device already"
            pinned = own.clone()
            device.label(pinned, "pinned")
            return pinned
        if function in (Tensor.tolist, Tensor.numpy) and here:
            assert function is Tensor.tolist, "numpy: the tensor is on the device"
            device.waited("tolist")
        wanted = options.get("device")
        if wanted is not None:
            options["device"] = CPU
            wants = torch.device(wanted).type == "cuda"
            if wants and function in (torch.tensor, torch.as_tensor):
                device.waited("a copy to the device")
        else:
            wants = any(map(device.holds, _tensors((arguments, options))))
        device.makes_here.append(wants)
        try:
            result = function(*arguments, **options)
        finally:
            device.makes_here.pop()
        if wanted is not None and isinstance(result, Tensor):
            if own is not None and own.untyped_storage()._cdata == result.untyped_storage()._cdata:
                result = result.clone()
            device.label(result, "gpu" if wants else "cpu")
        return result

    def _moved(
        self, own: Tensor, here: bool, function: Any, arguments: Any, options: dict[str, Any]
    ) -> Tensor:
        non_blocking = options.pop("non_blocking", False)
        if function in (Tensor.cuda, Tensor.cpu):
            wanted, arguments, options = function is Tensor.cuda, (), {}
        else:
            places = [*arguments, *options.values()]
            # of a tensor, what it says
            named = [GPU if isinstance(p, Tensor) and self.device.holds(p) else p for p in places]
            named = [p for p in named if isinstance(p, str | torch.device)]
            wanted = torch.device(named[0]).type == "cuda" if named else here
            arguments = tree_map_only(str | torch.device, lambda _: CPU, arguments)
            options = tree_map_only(str | torch.device, lambda _: CPU, options)
        if wanted != here:
            own = self.device.sent(own, here=wanted, non_blocking=non_blocking)
        self.device.makes_here.append(wanted)
        try:
            return own.to(*arguments, **options) if arguments or options else own
        finally:
            self.device.makes_here.pop()


_GETTERS = {
    Tensor.device.__get__: GPU,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
    Tensor.get_device: 0,
}


class _Operators(TorchDispatchMode):
    """What operators compute, in forward and backward passes."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, function: Any, kinds: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options, device = options or {}, self.device
        name = function.overloadpacket.__name__
        tensors = list(_tensors((arguments, options)))
        others = [t for t in tensors if not device.holds(t)]
        here = len(others) < len(tensors)
        if name == "copy_":
            self._copied(*arguments[:2], non_blocking=bool(arguments[2:] and arguments[2]))
        elif here:
            self._check(function, name, others, arguments)
        if not tensors and name in MAKE:
            here = device.makes_here[-1]
        known = {t.untyped_storage()._cdata for t in tensors}
        result = function(*arguments, **options)
        for made in _tensors(result):
            if made.untyped_storage()._cdata not in known:
                device.label(made, "gpu" if here else "cpu")
        return result

    def _copied(self, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
        to, of = self.device.holds(target), self.device.holds(source)
        host = source if to else target
        if to != of and not (non_blocking and self.device.is_pinned(host)):
            self.device.waited("a copy to the device" if to else "a copy from the device")

    def _check(self, function: Any, name: str, others: list[Tensor], arguments: Any) -> None:
        # a scalar of the host is an argument of the kernel
        scalars = torch.Tag.pointwise in function.tags or name in ("where", "fill_", "masked_fill")
        others = [t for t in others if t.dim() or not scalars]
        if others and name in TAKE_INDICES:
            self.device.waited("indices on the host")
        elif others:
            shapes = ", ".join(str(list(t.shape)) for t in others)
            raise RuntimeError(f"{function}: on the CPU beside tensors on the device: {shapes}")
        if name in ASK:
            self.device.waited(name)
        if name in TAKE_INDICES and any(t.dtype == torch.bool for t in _tensors(arguments[1])):
            self.device.waited("an index of bools")


@pytest.fixture
def simulated_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    """Inside the test, torch sees a GPU."""
    device = SimulatedDevice()
    properties = types.SimpleNamespace(
        multi_processor_count=132, major=9, minor=0, total_memory=80 << 30, name="simulated"
    )
    said = {
        "is_available": True,
        "get_device_name": "a simulated GPU",
        "get_device_properties": properties,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
    }
    for name, value in said.items():
        real = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, _saying(real, value))
    monkeypatch.setattr(launch, "run", device.launched)
    monkeypatch.setattr(launch, "require_triton", lambda kind: None)
    monkeypatch.setattr(torch, "autocast", _both(torch.autocast))
    # it asks tensors for their device where no mode hears
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "_group_tensors_by_device_and_dtype",
        staticmethod(lambda *given: {(GPU, kind): v for (_, kind), v in grouped(*given).items()}),
    )
    # of what recomputation saves, shape and device are seen from inside of torch's calls
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda tensor: None)
    caches = (launch.processors, launch.memory_bytes, launch._device_architecture)
    for cached in (*caches, launch.wide_products):
        cached.cache_clear()
    calls = _Calls(device)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", _heard(calls))
    with _Operators(device), calls:
        yield device
    for cached in (*caches, launch.wide_products):
        cached.cache_clear()


def _saying(real: Any, value: Any) -> Any:
    def said(*arguments: Any, **options: Any) -> Any:
        inspect.signature(real).bind(*arguments, **options)
        return value

    return said


def _heard(calls: TorchFunctionMode) -> Any:
    """The backward pass, in which what is written in Python is seen as it is outside."""
    real = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run(*arguments: Any, **options: Any) -> Any:
        with calls:
            return real(*arguments, **options)

    return run


def _both(real: Any) -> Any:
    """Autocast of either device casts for both: the tensors are in truth the CPU's."""

    def autocast(device_type: str, *arguments: Any, **options: Any) -> Any:
        stack = contextlib.ExitStack()
        for kind in ("cuda", "cpu"):
            stack.enter_context(real(kind, *arguments, **options))
        return stack

    return autocast
