"""Attention's and rotary positions' shapes in `fastbert validate`: tile edges, sizes, tails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import ops
from fastbert.kernels.layout import Layout
from fastbert.kernels.ops import Rng

# lengths, rows of the tail, and the bound that picks tiles of their own (64, 128) or flat ones
Batch = tuple[tuple[int, ...], int, int]
SMALL: tuple[Batch, ...] = (((), 0, 64), ((5, 0, 30, 1), 3, 64), ((70, 3, 32), 5, 200))
LARGE: tuple[Batch, ...] = (
    ((), 0, 64),
    ((0, 0), 5, 64),
    ((1, 15, 16, 17, 63, 64, 64, 1), 77, 64),
    ((127, 128, 1, 65, 129 - 64), 3, 128),
    ((511, 512, 513, 1, 0, 129), 30, 513),
    ((1, 8192, 1, 1), 61, 8192),
)
HEADS = 3
VARIANTS = ("everything", "plain")
Found = tuple[str, str, tuple[int, ...], Callable[..., Any], Callable[[torch.Generator], Any]]


def checks(*, small: bool) -> Iterator[Found]:
    """Operator, variant, shape, call and inputs of each check."""
    for lengths, tail, max_seqlen in SMALL if small else LARGE:
        for head_dim in (32,) if small else (32, 64, 96, 128):
            for variant in VARIANTS if head_dim == 64 or small else VARIANTS[:1]:
                tokens = sum(lengths) + tail
                call = _attention(variant, lengths, tail, max_seqlen)
                shape = (tokens, HEADS, head_dim, max_seqlen)
                yield "attention", variant, shape, call, _projection(tokens, head_dim)
    for tokens in (0, 17) if small else (0, 17, 4096):
        for head_dim in (32,) if small else (32, 64, 96, 128):
            turned = (tokens, HEADS, head_dim)
            yield "rotary", "plain", turned, _rotary, _projection(tokens, head_dim)


def _projection(tokens: int, head_dim: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def inputs(generator: torch.Generator) -> dict[str, Tensor]:
        shape = (tokens, 3, HEADS, head_dim)
        return {"qkv": torch.randn(*shape, generator=generator, dtype=torch.float64)}

    return inputs


def _attention(
    variant: str, lengths: tuple[int, ...], tail: int, max_seqlen: int
) -> Callable[..., Any]:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    layouts: dict[torch.device, Layout] = {}

    def call(qkv: Tensor) -> Any:
        device = qkv.device
        if device not in layouts:
            layouts[device] = Layout(bounds, sum(lengths) + tail, max_seqlen).to(device)
        layout = layouts[device]
        if variant == "plain":
            return ops.fused_qkv_attention(qkv, layout.cu_seqlens, layout=layout)
        query, key, value = qkv.unbind(1)
        output, lse = ops.attention(
            query,
            key,
            value,
            layout.cu_seqlens,
            layout=layout,
            dropout_p=0.1,
            rng=Rng(seed=1, step=2, layer=3, site=1, exact=True),
            window=(300, 20),
            alibi_slopes=torch.tensor([0.5, 0.25, 0.0], device=device),
            return_lse=True,
        )
        # minus infinity in the tail has no distance
        return output, lse[:, : sum(lengths)]

    return call


def _rotary(qkv: Tensor) -> Tensor:
    half = qkv.shape[-1] // 2
    positions = torch.arange(len(qkv), device=qkv.device) % 512
    frequency = 10000.0 ** (-torch.arange(half, device=qkv.device, dtype=torch.float64) / half)
    angles = torch.arange(512, device=qkv.device)[:, None] * frequency
    return ops.rotary(qkv, angles.cos().float(), angles.sin().float(), positions)
