"""attn_implementation="fastbert": transformers' layers as they are, attention on packed tokens.

The lesser form of `accelerate`, for models it does not know: everything but attention computes
padding, and every layer packs and unpacks.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.packed_call import Packed

NAME = "fastbert"


def register_attention() -> str:
    """Make `attn_implementation="fastbert"` known to transformers (5.0 or newer).

    Returns:
        "fastbert", for `AutoModel.from_pretrained(..., attn_implementation=register_attention())`.

    Raises:
        InputError: transformers is not installed.
    """
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise InputError(
            "attn_implementation: transformers is not installed: pip install 'fastbert[dropin]'"
        ) from None
    package.AttentionInterface.register(NAME, attend)
    # without its own mask, padding would silently be attended to
    package.AttentionMaskInterface.register(NAME, plan)
    return NAME


def plan(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> Packed:
    """What transformers hands its layers as a mask: made once a forward pass.

    Args:
        attention_mask: [batch, length]; None where all tokens are real.
        options: by name, others in every release of transformers; `batch_size` and `kv_length` are
            read where there is no mask.
    """
    if attention_mask is not None:
        batch, length = attention_mask.shape
        device = attention_mask.device
    else:
        batch, length = options["batch_size"], options["kv_length"]
        device = torch.device(options.get("device") or "cpu")
    return Packed.of(attention_mask, (batch, length), device, training=False)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        module: the attention module.
        query, key, value: [batch, heads, length, head_dim].
        attention_mask: of `plan`, or None.
        scaling: of the scores.
        dropout: on the probabilities; drawn by our generator, seeded by torch's.
        sliding_window: places a query sees on either side, itself included.
        options: others of transformers.

    Returns:
        [batch, length, heads, head_dim], zeros at padding; no probabilities.

    Raises:
        ValueError: causal attention, a cache, or a mask that is not of [batch, length].
    """
    if getattr(module, "is_causal", False) or query.shape != key.shape:
        raise ValueError("attn_implementation fastbert: only encoders without cache are supported")
    packed = attention_mask
    if packed is None:
        shape = (query.shape[0], query.shape[2])
        packed = Packed.of(None, shape, query.device, training=False)
    if not isinstance(packed, Packed):
        raise ValueError(
            "attn_implementation fastbert: attention_mask must be [batch, length], got "
            f"{list(packed.shape)}"
        )
    # torch's generator, which checkpointing winds back, names the draw
    rng = Rng(int(torch.randint(1 << 62, ()))) if dropout else None
    places = None if sliding_window is None else sliding_window - 1
    query, key, value = (packed.pack(tensor.transpose(1, 2)) for tensor in (query, key, value))
    context = ops.attention(
        query,
        key,
        value,
        packed.layout.cu_seqlens,
        layout=packed.layout,
        softmax_scale=scaling,
        dropout_p=dropout,
        rng=rng,
        window=None if places is None else (places, places),
    )
    return packed.unpack(context), None
