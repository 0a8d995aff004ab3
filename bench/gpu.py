"""Timing on a GPU, and the two ceilings of a card: copy bandwidth and matrix-product rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What the card does at best, measured.

    Attributes:
        copy_gb_per_s: a large copy on the device, bytes read plus bytes written.
        matmul_tflop_per_s: a large bf16 product of random numbers.
    """

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def floor_ms(self, moved_bytes: float, operations: float) -> float:
        """No version can be faster: the larger of moving the bytes and of computing."""
        moving = moved_bytes / (self.copy_gb_per_s * 1e6)
        return max(moving, operations / (self.matmul_tflop_per_s * 1e9))


def time_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds by device events, cold cache, after a warm-up."""
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))


def peak_mib(call: Callable[[], Any]) -> float:
    """The most memory that one call holds beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> Ceilings:
    """Measure both; random numbers, since zeros multiply faster."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source))
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    matmul_ms = time_ms(lambda: a @ b)
    return Ceilings(2 * COPY_BYTES / copy_ms / 1e6, 2 * MATMUL_SIZE**3 / matmul_ms / 1e9)
