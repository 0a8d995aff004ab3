"""Which path runs an operator, and with which launch configuration. Imports no triton.

CUDA and HIP tensors run Triton, all others `reference`; with TRITON_INTERPRET=1 tensors on the CPU
run Triton's interpreter. FASTBERT_BACKEND or `use_backend` overrides it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# what a machine without a GPU stands in for when it counts programs
ASSUMED_PROCESSORS = 4
# up to this width a backward pass holds a row in registers; what is wider layer_norm_bwd shares out
# by columns, and embedding_bwd adds up in memory
HELD_WIDTH = 4096
ASSUMED_MEMORY_BYTES = 16 << 30

_override: str | None = os.environ.get("FASTBERT_BACKEND") or None
_assumed_architecture: str | None = None
_tried: dict[str, Launch] = {}
_recorded: list[Recorded] | None = None
_log = logging.getLogger("fastbert")


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched; every size is a power of two.

    Attributes:
        rows, columns, inner: the tile; `inner` is the depth of a matrix product's step.
        num_warps, num_stages: Triton's.
        programs_per_processor: of kernels that loop over their rows.
    """

    rows: int
    columns: int
    inner: int = 0
    num_warps: int = 4
    num_stages: int = 2
    programs_per_processor: int = 2


@dataclass(frozen=True)
class Measured:
    """A row of the launch table: what was fastest, and on which device that was seen."""

    launch: Launch
    measured_on: str


# (kernel, architecture, dtype, size): a row needs a measurement, so there is none yet
TABLE: dict[tuple[str, str, str, int], Measured] = {}


@dataclass(frozen=True)
class Recorded:
    """A launch that was noted instead of made."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    launch: Launch


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside, every operator runs `backend`, "reference" or "triton"; backward follows forward.

    Raises:
        ValueError: an unknown backend.
    """
    global _override
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: must be one of {', '.join(BACKENDS)}, got {backend!r}")
    before, _override = _override, backend
    try:
        yield
    finally:
        _override = before


def uses_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor run Triton kernels.

    Raises:
        ValueError: Triton was asked for where it cannot run.
    """
    if _override is None:
        return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")
    if _override == "reference":
        return False
    if _override != "triton":
        raise ValueError(
            f"FASTBERT_BACKEND: must be one of {', '.join(BACKENDS)}, got {_override!r}"
        )
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"backend triton: needs a CUDA or HIP tensor, got one on {tensor.device}; "
            "TRITON_INTERPRET=1, set before the start, runs kernels on the CPU, slowly, for tests"
        )
    return True


def describe(device: torch.device | str) -> str:
    """One line for the start of a run: which path operators take on this device."""
    probe = torch.empty(0, device=device)
    if not uses_triton(probe):
        return f"operators on {probe.device.type}: PyTorch (reference)"
    if probe.is_cuda:
        name = torch.cuda.get_device_name(probe.device)
        arch = architecture(probe.device)
        return f"operators on {name} ({arch}): Triton; {describe_rows(arch)}"
    return "operators on cpu: Triton's interpreter (slow, for tests)"


def describe_rows(arch: str) -> str:
    """Which rows of the launch table, and of the override file, kernels take there."""
    rows = {**TABLE, **overrides()}
    found = sorted(f"{kernel} {dtype} {size}" for kernel, own, dtype, size in rows if own == arch)
    if not found:
        return f"no launch is measured on {arch}, all take their defaults (fastbert tune measures)"
    source = f" ({override_path()})" if overrides() else ""
    return f"{len(found)} measured launches{source}: {', '.join(found)}; others by default"


@functools.cache
def require_triton(device_type: str) -> None:
    """Say once which path runs; raise RuntimeError, in one line, where Triton cannot."""
    remedy = "or set FASTBERT_BACKEND=reference"
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"triton is not installed: pip install triton, {remedy}")
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    if device_type == "cuda" and not any(shutil.which(name) for name in compilers if name):
        raise RuntimeError(f"Triton needs a C compiler, found none: install gcc, {remedy}")
    if INTERPRETED:
        from fastbert.kernels import interpreter

        interpreter.repair()
    _log.info(describe(device_type))


def run(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, launch: Launch, **constants: Any
) -> None:
    """Launch a Triton kernel; the one place where that happens."""
    if _recorded is not None:
        _recorded.append(Recorded(kernel, arguments, constants, launch))
        return
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](
            *arguments, **constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


def configure(kernel: str, tensor: Tensor, size: int) -> Launch:
    """The launch of `kernel` for the tensor's device and dtype.

    Args:
        kernel: its name, e.g. "layer_norm_fwd".
        tensor: what the kernel reads most of.
        size: hidden size, intermediate size or head size.

    Returns:
        The override file's row, else the table's, else a default that is safe everywhere.
    """
    return measured(kernel, tensor, size) or default(kernel, size, tensor.element_size())


def measured(kernel: str, tensor: Tensor, size: int) -> Launch | None:
    """The override file's row or else the table's; None where nothing was measured."""
    key = (kernel, architecture(tensor.device), str(tensor.dtype).removeprefix("torch."), size)
    if kernel in _tried:
        return _tried[kernel]
    row = overrides().get(key) or TABLE.get(key)
    return row.launch if row else None


def default(kernel: str, size: int, itemsize: int = 2) -> Launch:
    """A launch that is safe on every architecture: no spills, at most 64 KiB of shared memory."""
    if kernel in ("layer_norm_fwd", "embedding_fwd"):
        return _row_launch(size, elements=4096, elements_per_warp=1024)
    if kernel == "layer_norm_bwd" and size > HELD_WIDTH:
        return Launch(rows=1, columns=min(chunk_columns(size), 2048), num_warps=8)
    if kernel == "layer_norm_bwd":
        # where columns are masked, a warp holds less, and no block is fetched ahead: predicates are
        # few
        if size % chunk_columns(size):
            chosen = _row_launch(size, elements=512, elements_per_warp=256)
            chosen = replace(chosen, num_stages=1)
        else:
            # rows cost predicates too
            chosen = _row_launch(size, elements=512 if size <= 128 else 1024, elements_per_warp=384)
            # with two stages the next block is asked for when this one is done; the third asks
            # while one is worked on, and wide elements leave it no room on smaller cards
            chosen = replace(chosen, num_stages=3 if itemsize == 2 else 2)
        # a thread holds twelve elements where there are two warps, eight where there are more
        warps = 16 if chosen.num_warps > 2 else 12
        return replace(chosen, programs_per_processor=max(1, warps // chosen.num_warps))
    if kernel == "embedding_bwd" and size > HELD_WIDTH:
        return Launch(rows=1, columns=min(chunk_columns(size), 2048), num_warps=16)
    if kernel == "embedding_bwd":
        # three look-ups take more registers than a sum of two; many rows, or masked columns, take
        # more predicates than ptxas has for a warp of the usual size
        crowded = size <= 128 or size % chunk_columns(size)
        per_warp = 128 if crowded else 1024 // itemsize
        chosen = _row_launch(size, elements=1024, elements_per_warp=per_warp)
        return replace(
            chosen,
            columns=min(chosen.columns, 1024),
            programs_per_processor=max(1, 12 // chosen.num_warps),
        )
    if kernel == "dropout":
        columns = _columns(size, 256)
        return Launch(rows=1024 // columns, columns=columns, num_warps=4)
    if kernel == "bias_activation_fwd":
        return Launch(rows=4, columns=_columns(size, 512), num_warps=4)
    if kernel == "bias_activation_bwd":
        return Launch(
            rows=8,
            columns=_columns(size, 128),
            num_warps=4,
            num_stages=3,
            programs_per_processor=8,
        )
    if kernel == "linear_activation":
        return Launch(64, 64, inner=32, num_warps=4, num_stages=3, programs_per_processor=2)
    if kernel == "rotary":
        return Launch(rows=2048 // (1 << (size - 1).bit_length()), columns=size, num_warps=4)
    if kernel == "attention_words":
        return Launch(rows=256, columns=1, num_warps=4)
    if kernel == "column_sum":
        # rows are few: what counts is how many loads are on their way at once
        return Launch(rows=128, columns=32, num_warps=4)
    if kernel == "run_sums":
        return Launch(rows=32, columns=_columns(size, 1024), num_warps=4)
    if kernel == "join_runs":
        return Launch(rows=16, columns=_columns(size, 128), num_warps=4)
    if kernel == "gather_rows":
        return Launch(rows=4, columns=_columns(size, 1024), num_warps=4)
    if kernel == "cross_entropy":
        return Launch(rows=1, columns=_columns(size, 2048), num_warps=4)
    if kernel == "bias_gradient":
        return Launch(rows=64, columns=128, num_warps=4)
    raise KeyError(kernel)


def chunk_columns(width: int) -> int:
    """The power of two whose fewest multiples cover a row of `width` with the least waste.

    768 is covered by 3 x 256, without the waste of 1024. At most eight multiples, at least 32.
    """
    choices = [size for size in (2**n for n in range(5, 14)) if -(-width // size) <= 8]
    return min(choices, key=lambda size: (-(-width // size) * size, -size))


def product_precision() -> str:
    """How kernels round fp32 products: "tf32" where the user lets torch do so, else "ieee"."""
    # the older switch cannot be read once the newer one was set
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.backends.cuda.matmul.allow_tf32 if newer is None else newer == "tf32"
    return "tf32" if allowed else "ieee"


def programs(tensor: Tensor, launch: Launch, blocks: int) -> int:
    """How many programs share `blocks` blocks of rows, in kernels that loop."""
    return max(1, min(blocks, processors(tensor.device) * launch.programs_per_processor))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device."""
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def memory_bytes(device: torch.device) -> int:
    """All memory of the device, used or free."""
    if device.type != "cuda":
        return ASSUMED_MEMORY_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory)


@functools.cache
def wide_products(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether torch makes an fp32 product of 16-bit matrices, and adds one to an fp32 matrix.

    Its releases and builds differ in the dtypes they let meet.
    """
    if device.type != "cuda":
        return False, False
    narrow = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    makes = adds = False
    with contextlib.suppress(RuntimeError, TypeError):
        torch.mm(narrow, narrow, out_dtype=torch.float32)
        makes = True
        torch.addmm(total, narrow, narrow, out_dtype=torch.float32, out=total)
        adds = True
    return makes, adds


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", or "cpu"."""
    if _assumed_architecture is not None:
        return _assumed_architecture
    return _device_architecture(device)


@functools.cache
def _device_architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@contextlib.contextmanager
def assume_architecture(name: str) -> Iterator[None]:
    """Inside, configurations are those of another architecture: for ahead-of-time compilation."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, name
    try:
        yield
    finally:
        _assumed_architecture = before


@contextlib.contextmanager
def trying(kernel: str, candidate: Launch) -> Iterator[None]:
    """Inside, the kernel is launched as `candidate` says, whatever table and default hold."""
    _tried[kernel] = candidate
    try:
        yield
    finally:
        del _tried[kernel]


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Inside, launches are noted instead of made, so that meta tensors can stand for real ones."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def override_path() -> Path:
    """Where `fastbert tune` writes: FASTBERT_LAUNCH_FILE, else in the user's cache folder."""
    named = os.environ.get("FASTBERT_LAUNCH_FILE")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastbert" / "launch.json"


@functools.cache
def overrides() -> dict[tuple[str, str, str, int], Measured]:
    """The rows of the override file, read once a process; none where there is no file.

    Raises:
        ValueError: a damaged file.
    """
    path = override_path()
    if not path.is_file():
        return {}
    try:
        return dict(_row(entry) for entry in json.loads(path.read_text())["rows"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a launch table ({error}): delete it, or run `fastbert tune` again"
        ) from error


def table_entry(key: tuple[str, str, str, int], measured: Measured) -> dict[str, Any]:
    """One row as the override file holds it."""
    names = ("kernel", "architecture", "dtype", "size")
    return {
        **dict(zip(names, key, strict=True)),
        "launch": asdict(measured.launch),
        "measured_on": measured.measured_on,
    }


def _row(entry: dict[str, Any]) -> tuple[tuple[str, str, str, int], Measured]:
    names = {field.name for field in fields(Launch)}
    unknown = set(entry["launch"]) - names
    if unknown:
        raise KeyError(f"unknown {', '.join(sorted(unknown))}, known {', '.join(sorted(names))}")
    key = (entry["kernel"], entry["architecture"], entry["dtype"], int(entry["size"]))
    return key, Measured(Launch(**entry["launch"]), entry["measured_on"])


def _row_launch(width: int, elements: int, elements_per_warp: int) -> Launch:
    columns = chunk_columns(width)
    padded = -(-width // columns) * columns
    rows = 1
    while rows < 32 and 2 * rows * padded <= elements:
        rows *= 2
    warps = 1
    while warps < 16 and warps * elements_per_warp < rows * padded:
        warps *= 2
    return Launch(rows=rows, columns=columns, num_warps=warps)


def _columns(size: int, most: int) -> int:
    columns = 32
    while columns < min(size, most):
        columns *= 2
    return columns
