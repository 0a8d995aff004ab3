"""What a machine does at best, measured: a large copy, and large matrix products a dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastbert.bench import gpu
from fastbert.bench.timing import interleaved_ms

CPU_COPY_BYTES = 1 << 28
CPU_MATMUL_SIZE = 1536
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy_gb_per_s: of a large copy, bytes read plus bytes written.
    tflop_per_s: of a large product of random numbers, by dtype.
    """

    copy_gb_per_s: float
    tflop_per_s: dict[str, float]

    def floor_ms(self, moved_bytes: float, operations: float, dtype: str) -> float | None:
        """No version can be faster: the larger of moving the bytes and of computing; None for a
        dtype whose rate was not measured."""
        if dtype not in self.tflop_per_s:
            return None
        moving = moved_bytes / (self.copy_gb_per_s * 1e6)
        return max(moving, operations / (self.tflop_per_s[dtype] * 1e9))


def measure(device: torch.device, dtypes: list[str]) -> Ceilings:
    """Measure both, for these dtypes; random numbers, since zeros multiply faster."""
    if device.type == "cuda":
        best = gpu.ceilings()
        return Ceilings(best.copy_gb_per_s, {"bf16": best.matmul_tflop_per_s})
    source = torch.randn(CPU_COPY_BYTES // 4)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source)}
    size = CPU_MATMUL_SIZE
    for dtype in dtypes:
        a, b = (torch.randn(size, size, dtype=DTYPES[dtype]) for _ in range(2))
        steps[dtype] = lambda a=a, b=b: torch.nn.functional.linear(a, b)  # type: ignore[misc]
        if dtype == "fp32" and torch.backends.mkldnn.is_available():
            # the other library inside torch, which 16 bits have anyway, in both orders: which one
            # it likes better differs by machine
            for order, weight in (("rows", b), ("columns", b.t())):
                steps[f"fp32, oneDNN by {order}"] = functools.partial(
                    torch.ops.mkldnn._linear_pointwise, a, weight, None, "none", [], ""
                )
    # the best of several: a ceiling is what the machine can do, not what it did beside others
    best_ms = {name: min(times) for name, times in interleaved_ms(steps, repeats=5).items()}
    fastest = {
        dtype: min(taken for name, taken in best_ms.items() if name.startswith(dtype))
        for dtype in dtypes
    }
    rates = {dtype: 2 * size**3 / fastest[dtype] / 1e9 for dtype in dtypes}
    return Ceilings(2 * CPU_COPY_BYTES / best_ms["copy"] / 1e6, rates)
