"""Attention's launches that ship, for the compile matrix: every head size, path and variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert.bench.compile_matrix import Case
from fastbert.kernels.attention_launch import HEAD_DIMS
from fastbert.kernels.layout import OWNED_BLOCKS

ROWS, HEADS = 16384, 12
DROPOUT = 0.1
WINDOW = 64
# every variant is compiled at this size; the others take the one that needs most registers
BASE = 64
VARIANTS = ("everything", "plain", "dropout", "window", "alibi")


def cases() -> list[Case]:
    """Forward and backward by flat tiles (block 0) and by tiles that own their sequences."""
    found = []
    for head_dim in HEAD_DIMS:
        for variant in VARIANTS if head_dim == BASE else VARIANTS[:1]:
            for block in (0, *OWNED_BLOCKS):
                quick = head_dim == BASE and variant == "dropout" and block < OWNED_BLOCKS[-1]
                end = f"_owned_{block}" if block else ""
                for kernel, make in (("attention_fwd", forward), ("attention_bwd", backward)):
                    call = make(head_dim, variant, block)
                    found.append(Case(kernel + end, variant, head_dim, call, quick))
        found.append(Case("rotary", "plain", head_dim, _rotary(head_dim), head_dim == BASE))
    found.append(Case("attention_words", "plain", HEADS, _attention_words, True))
    return found


def forward(head_dim: int, variant: str, block: int) -> Callable[[torch.dtype], Any]:
    """The forward launcher on meta tensors."""

    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.attention import attention_fwd

        query, key, value = _projection(head_dim, dtype)
        attention_fwd(query, key, value, **_context(head_dim, variant, block))

    return call


def backward(head_dim: int, variant: str, block: int) -> Callable[[torch.dtype], Any]:
    """The backward launcher on meta tensors."""

    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.attention_backward import attention_bwd

        out = _meta(ROWS, HEADS, head_dim, dtype=dtype)
        lse = _meta(HEADS, ROWS, dtype=torch.float32)
        dlse = lse if variant == "everything" else None
        query, key, value = _projection(head_dim, dtype)
        context = _context(head_dim, variant, block)
        attention_bwd(out, dlse, query, key, value, out, lse, **context)

    return call


def _rotary(head_dim: int) -> Callable[[torch.dtype], Any]:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.rotary import rotary

        table = _meta(8192, head_dim // 2, dtype=torch.float32)
        qkv = _meta(ROWS, 3, HEADS, head_dim, dtype=dtype)
        rotary(qkv, table, table, _meta(ROWS, dtype=torch.int32), False)

    return call


def _attention_words(dtype: torch.dtype) -> None:
    from fastbert.kernels.attention_words import attention_words

    row = _meta(ROWS, dtype=torch.int32)
    attention_words(_meta(3, dtype=torch.int64), row, row, ROWS, HEADS)


def _projection(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _meta(ROWS, 3, HEADS, head_dim, dtype=dtype).unbind(1)


def _context(head_dim: int, variant: str, block: int) -> dict[str, Any]:
    """What both launchers take behind their tensors."""
    row = _meta(ROWS, dtype=torch.int32)
    drops = variant in ("dropout", "everything")
    window = WINDOW if variant in ("window", "everything") else None
    slopes = variant in ("alibi", "everything")
    return {
        "starts": row,
        "ends": row,
        "tiles": _meta(2 * -(-ROWS // block) + 2, dtype=torch.int32) if block else None,
        "block": block,
        "alibi_slopes": _meta(HEADS, dtype=torch.float32) if slopes else None,
        "before": window,
        "after": window,
        "softmax_scale": head_dim**-0.5,
        "words": _meta(2, HEADS, ROWS, dtype=torch.int32) if drops else None,
        "state": _meta(3, dtype=torch.int64) if drops else None,
        "layer": 1,
        "site": 1,
        "dropout_p": DROPOUT if drops else 0.0,
    }


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
