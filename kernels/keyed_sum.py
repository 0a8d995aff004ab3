"""Sum of the rows that share a key, in one fixed order: the gradient of every table look-up.

Keys are sorted on the device, equal ones in the order of their rows, and runs of equal keys are
added up from first to last: within blocks of entries, then across blocks, for a run may be as long
as the stream. The grid depends on the number of entries alone, the host waits for nothing, and
nothing is added atomically: a repeat is the same bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import launch


# one program walks ENTRIES sorted entries. A run of equal keys that lies within them goes to its
# row of the table; what reaches in from the block before goes to the block's row of `heads`, what
# begins here and reaches out goes to its row of `tails`
@triton.jit(do_not_specialize=["entries", "tokens"])
def _run_sums_kernel(
    dtotal_ptr, keys_ptr, order_ptr, heads_ptr, tails_ptr, out_ptr,
    entries, tokens,
    LIMIT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < WIDTH
    first = block * ENTRIES
    key = tl.load(keys_ptr + first)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    reaches_in = key == before
    total = tl.zeros([COLUMNS], tl.float32)
    for step in range(0, ENTRIES):
        entry = first + step
        real = (entry < entries) & (key < LIMIT)
        after = tl.load(keys_ptr + entry + 1, mask=entry + 1 < entries, other=LIMIT)
        # entries count in 32 bits, in which a remainder costs a fraction of one in 64
        row = tl.load(order_ptr + entry, mask=real, other=0).to(tl.int32) % tokens
        place = dtotal_ptr + row.to(tl.int64) * WIDTH + columns
        total += tl.load(place, mask=column_mask & real, other=0.0)
        ends = key != after
        inside = tl.where(ends, out_ptr + key.to(tl.int64) * WIDTH, tails_ptr + block * WIDTH)
        place = tl.where(reaches_in, heads_ptr + block * WIDTH, inside)
        done = real & (ends | (step == ENTRIES - 1))
        tl.store(place + columns, total, mask=column_mask & done)
        total = tl.where(ends, 0.0, total)
        reaches_in = reaches_in & (key == after)
        key = after


# one program joins the run that begins in its block and reaches out of it, if there is one
@triton.jit(do_not_specialize=["entries", "blocks"])
def _join_runs_kernel(
    heads_ptr, tails_ptr, keys_ptr, out_ptr,
    entries, blocks,
    LIMIT: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < WIDTH
    first, following = block * ENTRIES, (block + 1) * ENTRIES
    key = tl.load(keys_ptr + following - 1, mask=following < entries, other=LIMIT)
    after = tl.load(keys_ptr + following, mask=following < entries, other=LIMIT)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    going = (key == after) & (key < LIMIT) & (key != before)
    begins = going
    total = tl.zeros([BLOCKS, COLUMNS], tl.float32)
    other = block + 1
    while going:
        others = other + tl.arange(0, BLOCKS)
        leading = tl.load(keys_ptr + others * ENTRIES, mask=others < blocks, other=LIMIT)
        same = leading == key
        place = heads_ptr + others.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.load(place, mask=same[:, None] & column_mask[None, :], other=0.0)
        going = tl.min(same.to(tl.int32), axis=0) == 1
        other += BLOCKS
    tail = tl.load(
        tails_ptr + block.to(tl.int64) * WIDTH + columns, mask=column_mask & begins, other=0.0
    )
    place = out_ptr + key.to(tl.int64) * WIDTH + columns
    tl.store(place, tail + tl.sum(total, axis=0), mask=column_mask & begins)


def sum_by_key(rows: Tensor, keys: Tensor, limit: int) -> Tensor:
    """[limit, width] fp32: row k is the sum of the rows with key k, in a fixed order.

    Args:
        rows: [tokens, width] fp32.
        keys: [n * tokens] int32, entry i of row i % tokens; keys of `limit` and more do not count.
        limit: rows of the result.
    """
    tokens, width = rows.shape
    entries = keys.shape[0]
    # stable: equal keys keep the order of their tokens
    keys, order = torch.sort(keys, stable=True)
    chosen = launch.configure("run_sums", rows, width)
    blocks = triton.cdiv(entries, chosen.rows)
    heads = torch.empty((blocks, width), dtype=torch.float32, device=rows.device)
    tails = torch.empty((blocks, width), dtype=torch.float32, device=rows.device)
    out = torch.zeros((limit, width), dtype=torch.float32, device=rows.device)
    columns = triton.cdiv(width, chosen.columns)
    launch.run(
        _run_sums_kernel,
        (blocks, columns),
        rows, keys, order, heads, tails, out,
        entries, tokens,
        launch=chosen, LIMIT=limit, WIDTH=width, ENTRIES=chosen.rows, COLUMNS=chosen.columns,
    )  # fmt: skip
    joining = launch.configure("join_runs", rows, width)
    launch.run(
        _join_runs_kernel,
        (blocks, triton.cdiv(width, joining.columns)),
        heads, tails, keys, out,
        entries, blocks,
        launch=joining, LIMIT=limit, WIDTH=width, ENTRIES=chosen.rows, COLUMNS=joining.columns,
        BLOCKS=joining.rows,
    )  # fmt: skip
    return out
