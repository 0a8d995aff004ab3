"""Sum of each column of [rows, columns] fp32, in one fixed order: the end of every reduction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch


# one program owns BLOCK_N columns and walks down the rows
@triton.jit(do_not_specialize=["rows"])
def _column_sum_kernel(
    partial_ptr, out_ptr,
    rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(
            partial_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0
        )
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < columns)


def column_sum(partial: Tensor) -> Tensor:
    """[rows, columns] fp32, contiguous -> [columns] fp32."""
    rows, columns = partial.shape
    out = torch.empty(columns, dtype=torch.float32, device=partial.device)
    chosen = launch.configure("column_sum", partial, columns)
    launch.run(
        _column_sum_kernel,
        (triton.cdiv(columns, chosen.columns),),
        partial, out,
        rows, columns,
        launch=chosen, BLOCK_M=chosen.rows, BLOCK_N=chosen.columns,
    )  # fmt: skip
    return out
