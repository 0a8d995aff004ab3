"""How much of a step on a CPU is matrix products, which no rewriting makes faster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fastbert.bench.memory import stderr_closed

# of one projection, of a batch of them, and torch's fused attention, which is products mostly
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)
STEPS = 3


def matrix_share(step: Callable[[], object]) -> float:
    """The share of a step's time in matrix products, fused attention included.

    Times are those of the calling thread. The profiler adds a little to every operator, most of
    which are small and no product, so that the true share is rather higher.
    """
    # the profiler announces its beginning and its end there
    with stderr_closed(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    return share_of(profiled.key_averages())


def share_of(averages: Iterable[Any]) -> float:
    """Of profiler averages: the part of all self time that operators of `PRODUCTS` take."""
    times = [(event.key, event.self_cpu_time_total) for event in averages]
    total = sum(time for _, time in times)
    return sum(time for name, time in times if name in PRODUCTS) / total if total else 0.0
