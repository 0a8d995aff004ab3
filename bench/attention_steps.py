"""What the attention benches run: mixtures of lengths, batches of them, and steps to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench.attention_peers import Batch, Prepared
from fastbert.kernels import ops
from fastbert.kernels.layout import Layout
from fastbert.kernels.ops import Rng

DTYPE = torch.bfloat16
HEADS, HEAD_DIM = 12, 64
UNIFORM = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def distributions(tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Names and lengths: uniform ones, and two mixtures that BERT meets."""
    for length in UNIFORM:
        if length <= tokens:
            yield str(length), [length] * (tokens // length)
    generator = np.random.default_rng(0)
    # log-normal about a mean of 45, as sentences are
    yield "16 to 128", _filled(tokens, lambda: generator.lognormal(np.log(36.0), 0.7), 16, 128)
    yield "32 to 512", _filled(tokens, lambda: generator.lognormal(np.log(128.0), 0.8), 32, 512)
    long = min(8192, tokens // 2)
    yield f"{long} and ones", [long, *[1] * min(256, tokens - long)]


def batch_of(
    lengths: list[int],
    capacity: int,
    device: torch.device,
    dtype: torch.dtype = DTYPE,
) -> Batch:
    """Random projections for the lengths, the rest of the capacity a tail."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(bounds, capacity, max(lengths)).to(device)
    qkv = torch.randn(capacity, 3, HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    return Batch(qkv, lengths, layout)


def ours(dropout_p: float) -> Callable[[Batch], Prepared]:
    """Our attention on a batch, by the path that is on."""

    def prepare(batch: Batch) -> Prepared:
        leaf = batch.qkv.detach().requires_grad_()
        rng = Rng(seed=1, exact=True).on(leaf.device)
        options: dict[str, Any] = {"layout": batch.layout, "dropout_p": dropout_p, "rng": rng}
        bounds = batch.layout.cu_seqlens
        return lambda: ops.fused_qkv_attention(leaf, bounds, **options), [leaf]

    return prepare


def step_of(
    prepare: Callable[[Batch], Prepared], batch: Batch, forward_only: bool
) -> Callable[[], Any]:
    """One forward pass without gradients, or one forward and backward pass."""
    call, leaves = prepare(batch)

    def forward() -> Any:
        with torch.no_grad():
            return call()

    if forward_only:
        return forward
    gradient = flowing(call())
    return lambda: torch.autograd.grad(call(), leaves, gradient)


def flowing(output: Tensor) -> Tensor:
    """What flows back into an output, the same for every provider."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(DTYPE).to(output)


def _filled(tokens: int, draw: Callable[[], float], least: int, most: int) -> list[int]:
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(min(max(draw(), least), most)))
    lengths[-1] -= sum(lengths) - tokens
    return lengths
