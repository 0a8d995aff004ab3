"""The fused projection of a layer whose result is read in some rows: keys and values of every row,
queries of those rows alone, in plain PyTorch for any device.

    forward:  q = x_rows Wq' + bq in the rows, zero elsewhere;  [k | v] = x Wkv' + bkv
    backward: dx = dkv Wkv, plus dq_rows Wq in the rows

A row without a query attends evenly, and nobody reads what it gets; with no gradient at its output
it hands none on to keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels.checks import check_shapes, compute_dtype, no_autocast
from fastbert.kernels.products import input_gradient, linear, weight_gradient


def selected_qkv(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Queries of the selected rows, keys and values of all, as one fused projection.

    Args:
        x: [tokens, width].
        weight: [3 * hidden_size, width], of query, key and value; bias: [3 * hidden_size].
        rows: [selected] int64, rows of `x`; one may come several times.

    Returns:
        [tokens, 3 * hidden_size] in the dtype of `x`, or the autocast dtype; zero in the queries of
        rows that are not selected.

    Raises:
        ValueError: shapes that do not fit.
    """
    width = x.shape[-1]
    if x.dim() != 2 or weight.shape[0] % 3:
        raise ValueError(
            "selected_qkv: x must be [tokens, width] and weight [3 * hidden_size, width], got "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    check_shapes(
        "selected_qkv",
        ("weight", weight, (weight.shape[0], width)),
        ("bias", bias, weight.shape[:1]),
    )
    dtype = compute_dtype(x)
    with no_autocast(x):
        offset = None if bias is None else bias.to(dtype)
        return _SelectedQKV.apply(x.to(dtype), weight.to(dtype), offset, rows)


class _SelectedQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        hidden_size = weight.shape[0] // 3
        slots = torch.arange(len(rows), device=rows.device)
        # the first slot of each row, or one past the last slot
        slot_of = torch.full((len(x),), len(rows), device=rows.device)
        slot_of.scatter_reduce_(0, rows, slots, "amin")
        # a row that comes twice has one query, and its gradient goes to one slot
        first = (slot_of.index_select(0, rows) == slots)[:, None]
        query_bias, other_bias = (None, None) if bias is None else bias.tensor_split([hidden_size])
        query = linear(x.index_select(0, rows), weight[:hidden_size], query_bias)
        projected = x.new_empty(len(x), 3 * hidden_size)
        # a gather, which is the same in every run, in place of a scatter
        projected[:, :hidden_size] = F.pad(query, (0, 0, 0, 1)).index_select(0, slot_of)
        projected[:, hidden_size:] = linear(x, weight[hidden_size:], other_bias)
        ctx.save_for_backward(x, weight, rows, first)
        return projected

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, rows, first = ctx.saved_tensors
        hidden_size = weight.shape[0] // 3
        of_others = gradient[:, hidden_size:]
        of_query = gradient[:, :hidden_size].index_select(0, rows).masked_fill(~first, 0.0)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(of_others, weight[hidden_size:])
            dx = dx.index_add(0, rows, input_gradient(of_query, weight[:hidden_size]))
        if ctx.needs_input_grad[1]:
            of_rows = weight_gradient(of_query, x.index_select(0, rows))
            dweight = torch.cat([of_rows, weight_gradient(of_others, x)])
        if ctx.needs_input_grad[2]:
            dbias = torch.cat([of_query.sum(dim=0), of_others.sum(dim=0)])
        return dx, dweight, dbias, None
