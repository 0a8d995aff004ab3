"""What holds of the kernels without running one: bytes, operations, registers, occupancy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from fastbert.bench import compile_matrix, kernel_cases
from fastbert.bench.operators import Operator, operators
from fastbert.kernels import launch

ARCHITECTURE = "sm_90"
ROWS, WIDTHS = 16384, (768, 1024)


def main() -> int:
    """Print a line an operator; 0."""
    found = kernel_cases.cases()
    header = f"{'operator':<40} {'shape':<18} {'MB moved':>9} {'GFLOP':>7}"
    print(f"{header}  kernels on {ARCHITECTURE}: registers, programs a processor")
    for operator in operators(ROWS, torch.bfloat16.itemsize, WIDTHS):
        shape = " x ".join(map(str, operator.shape))
        kernels = ", ".join(_resources(found, operator)) or "triton is not installed"
        print(
            f"{operator.name:<40} {shape:<18} {operator.moved_bytes / 1e6:>9.1f} "
            f"{operator.operations / 1e9:>7.1f}  {kernels}",
            flush=True,
        )
    return 0


def programs_at_once(registers: int, num_warps: int, shared_bytes: int) -> int:
    """Programs one sm_90 multiprocessor holds, by its registers, shared memory and warps."""
    threads = 32 * num_warps
    # registers are handed out a warp at a time, 256 at least
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps) if registers else 32
    by_shared = 227 * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, 2048 // threads, 32)


def _resources(found: list[compile_matrix.Case], operator: Operator) -> Iterator[str]:
    if importlib.util.find_spec("triton") is None or launch.INTERPRETED:
        return
    variant = "dropout" if "dropout" in operator.name else "residual"
    for kernel in operator.kernels:
        chosen = [c for c in found if c.kernel == kernel and c.size == operator.shape[-1]]
        # not every size has every variant; the first needs most registers
        nearest = [c for c in chosen if c.variant == variant] or chosen
        jobs = compile_matrix.jobs(nearest[:1], False)
        wanted = [
            job
            for job in jobs
            if (job.architecture, job.dtype) == (ARCHITECTURE, "bfloat16") and ":" not in job.case
        ]
        for row in compile_matrix.run(wanted, 1):
            at_once = programs_at_once(row.registers, row.num_warps, row.shared_bytes)
            yield f"{kernel} {row.registers}, {at_once} of {row.num_warps} warps"
