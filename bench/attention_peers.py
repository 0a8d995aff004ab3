"""What attention is compared with: each takes a batch and returns a call that runs it.

Peers on padded inputs get them padded already: packing is our side's advantage and not timed here,
but the padding they compute on is. They get query, key and value apart, as suits them best.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.bench import gpu
from fastbert.kernels.layout import Layout

Prepared = tuple[Callable[[], Tensor], list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """One packed batch: qkv [tokens, 3, heads, head_dim], its lengths and its layout."""

    qkv: Tensor
    lengths: list[int]
    layout: Layout

    def parts(self) -> list[Tensor]:
        """Query, key and value of the real tokens, each a tensor of its own to differentiate."""
        parts = self.qkv.detach()[: sum(self.lengths)].unbind(1)
        return [part.contiguous().requires_grad_() for part in parts]


def varlen(batch: Batch) -> Prepared:
    """torch.nn.attention.varlen.varlen_attn, which is FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = batch.layout.cu_seqlens, max(batch.lengths)
    query, key, value = parts = batch.parts()

    def call() -> Tensor:
        output = varlen_attn(query, key, value, bounds, bounds, longest, longest)
        assert isinstance(output, Tensor)
        return output

    return call, parts


def loop(batch: Batch) -> Prepared:
    """One call a sequence, which is what the reference path's groups replace."""
    query, key, value = parts = batch.parts()

    def call() -> Tensor:
        pieces = [
            F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            for q, k, v in zip(
                *(part.transpose(0, 1).split(batch.lengths, 1) for part in (query, key, value)),
                strict=True,
            )
        ]
        return torch.cat(pieces, dim=1).transpose(0, 1)

    return call, parts


def padded(backend: SDPBackend | None) -> Callable[[Batch], Prepared]:
    """scaled_dot_product_attention on a padded batch, with one backend pinned; None for torch's
    own choice."""

    def prepare(batch: Batch) -> Prepared:
        mixed = len(set(batch.lengths)) > 1
        if mixed and backend is SDPBackend.FLASH_ATTENTION:
            raise ValueError("takes no mask")
        longest, device = max(batch.lengths), batch.qkv.device
        lengths = torch.tensor(batch.lengths, device=device)[:, None]
        place = torch.arange(longest, device=device)
        mask = (place < lengths)[:, None, None, :].expand(-1, 1, longest, -1) if mixed else None
        index = batch.layout.cu_seqlens[:-1, None].long() + torch.minimum(place, lengths - 1)
        # [sequences, heads, longest, head_dim], padded outside the clock
        query, key, value = parts = [
            part.detach()[index].transpose(1, 2).contiguous().requires_grad_()
            for part in batch.parts()
        ]

        def call() -> Tensor:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        return call, parts

    return prepare


def nested(batch: Batch) -> Prepared:
    """scaled_dot_product_attention on jagged nested tensors."""
    offsets = batch.layout.cu_seqlens.long()
    longest, shortest = max(batch.lengths), min(batch.lengths)
    parts = batch.parts()

    def call() -> Tensor:
        query, key, value = [
            torch.nested.nested_tensor_from_jagged(
                part, offsets, min_seqlen=shortest, max_seqlen=longest
            ).transpose(1, 2)
            for part in parts
        ]
        attended: Tensor = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = attended.transpose(1, 2).values()
        return output

    return call, parts


def flex(batch: Batch, *, with_mask: bool = False) -> Prepared:
    """FlexAttention compiled with a document mask; `with_mask` makes the mask in every call."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = _compiled(flex_attention)
    made = document_mask(batch)
    parts = [part.detach().transpose(0, 1)[None].requires_grad_() for part in batch.parts()]

    def call() -> Tensor:
        output: Tensor = compiled(*parts, block_mask=document_mask(batch) if with_mask else made)
        return output

    return call, parts


def document_mask(batch: Batch) -> Any:
    """FlexAttention's block mask of the real tokens of a packed stream."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens, starts = sum(batch.lengths), batch.layout.rows().starts

    def same(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return starts[row] == starts[column]

    return _compiled(create_block_mask)(same, None, None, tokens, tokens, device=batch.qkv.device)


def mask_construction_ms(batch: Batch) -> dict[str, float]:
    """The document mask's own time; empty where FlexAttention does not run."""
    try:
        return {"flex's mask alone": gpu.time_ms(lambda: document_mask(batch))}
    except Exception:  # the reason stands beside the peer that needs the mask
        return {}


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


PEERS: dict[str, Callable[[Batch], Prepared]] = {
    "varlen_attn": varlen,
    "sdpa flash, padded": padded(SDPBackend.FLASH_ATTENTION),
    "sdpa efficient, padded": padded(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa cudnn, padded": padded(SDPBackend.CUDNN_ATTENTION),
    "nested": nested,
    "flex": flex,
    "flex with its mask": functools.partial(flex, with_mask=True),
}
