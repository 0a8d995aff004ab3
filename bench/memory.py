"""The most memory that one step's tensors hold at once, and whether there is as much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastbert.bench import gpu

MEMORY_INFO = Path("/proc/meminfo")


def too_little(needed: float, device: torch.device) -> str:
    """Why a step of so many bytes is not begun: Linux would kill the bench, and what it measured
    so far would be all there is. Empty where there is room, or where nobody says how much."""
    free = _free(device)
    if free is None or needed <= free:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not MEMORY_INFO.exists():
        return None
    lines = MEMORY_INFO.read_text(encoding="ascii").splitlines()
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def step_mib(step: Callable[[], object], device: torch.device) -> float:
    """MiB beyond what was held before the call, by torch's own account."""
    return gpu.peak_mib(step) if device.type == "cuda" else cpu_peak_mib(step)


def cpu_peak_mib(step: Callable[[], object]) -> float:
    """The most memory that one call's tensors hold at once, by torch's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # the profiler announces its beginning and its end there
    with (
        stderr_closed(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in moves:
        held += size
        peak = max(peak, held)
    return peak / 2**20


@contextlib.contextmanager
def stderr_closed() -> Iterator[None]:
    """Nothing of what libraries write to the process's standard error inside is seen."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
