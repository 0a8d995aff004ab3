"""Rotary positions on a fused projection, one pass before attention.

    out[i], out[i + half] = x[i] cos - x[i + half] sin, x[i + half] cos + x[i] sin

for the queries and keys of each token, by the angles of its position; values pass unchanged. The
gradient is the turn by the opposite angles. Nothing is saved but the tables and positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch


# one program turns BLOCK_M rows of head_dim elements; the stream is [tokens, 3, heads] such rows
@triton.jit(do_not_specialize=["tokens", "positions_in_tables"])
def _rotary_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr,
    row_stride, part_stride, head_stride,
    tokens, positions_in_tables,
    HEADS: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = place // (3 * HEADS)
    part = place // HEADS % 3
    column = tl.arange(0, BLOCK_D)
    row_mask = token < tokens
    mask = row_mask[:, None] & (column < HALF)[None, :]
    start = token * row_stride + part * part_stride + place % HEADS * head_stride
    source = qkv_ptr + start[:, None] + column[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + token, mask=row_mask, other=0).to(tl.int64)
    turns = (part < 2) & (position >= 0) & (position < positions_in_tables)
    angle = position[:, None] * HALF + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask & turns[:, None], other=1.0)
    sin = tl.load(sin_ptr + angle, mask=mask & turns[:, None], other=0.0)
    if INVERSE:
        sin = -sin
    target = out_ptr + place[:, None] * (2 * HALF) + column[None, :]
    tl.store(target, first * cos - second * sin, mask=mask)
    tl.store(target + HALF, second * cos + first * sin, mask=mask)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool) -> Tensor:
    """[tokens, 3, heads, head_dim] like qkv; `inverse` turns back."""
    tokens, parts, heads, head_dim = qkv.shape
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    chosen = launch.configure("rotary", qkv, head_dim)
    launch.run(
        _rotary_kernel,
        (triton.cdiv(tokens * parts * heads, chosen.rows),),
        qkv, cos, sin, positions, out,
        qkv.stride(0), qkv.stride(1), qkv.stride(2),
        tokens, len(cos),
        launch=chosen, HEADS=heads, HALF=head_dim // 2, INVERSE=inverse,
        BLOCK_M=chosen.rows, BLOCK_D=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return out
