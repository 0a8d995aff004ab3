"""attn_implementation="fastbert": transformers' layers as they are, attention on packed tokens.

The lesser form of `accelerate`, for models it does not know: everything but attention computes
padding, and every layer packs and unpacks.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
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


def plan(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    **options: Any,
) -> Packed:
    """What transformers hands its layers as a mask: made once a forward pass and kind of layer.

    Args:
        attention_mask: [batch, length]; None where all tokens are real.
        mask_function: what a query sees besides.
        options: by name, others in every release of transformers; `batch_size` and `kv_length` are
            read where there is no mask.

    Raises:
        ValueError: a pattern that is neither full nor a window, or padding before a sequence's
            first token, for which transformers' other implementations compute something.
    """
    windowed = _is_window(mask_function)
    if attention_mask is not None:
        batch, length = attention_mask.shape
        device = attention_mask.device
    else:
        batch, length = options["batch_size"], options["kv_length"]
        device = torch.device(options.get("device") or "cpu")
    packed = Packed.of(attention_mask, (batch, length), device)
    packed.windowed = windowed
    if packed.starts_late or (windowed and packed.has_holes):
        where = "before a sequence's first" if packed.starts_late else "between a sequence's"
        raise ValueError(
            f"attn_implementation fastbert: attention_mask has padding {where} token; "
            "sdpa computes such a batch"
        )
    return packed


def _is_window(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a pattern of transformers is a window both ways, and not everything."""
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__)
    if mask_function is None or name == "bidirectional_mask_function":
        return False
    if name == "and_masks.<locals>.and_mask":
        parts = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
        # every part is looked at, whatever the others are
        return sum(map(_is_window, parts)) > 0
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return True
    raise ValueError(
        f"attn_implementation fastbert: masks are full, or windows both ways, got {name}"
    )


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
        ValueError: causal attention, a cache, a mask that is not of [batch, length], or a window
            that the mask does not have.
    """
    if getattr(module, "is_causal", False) or query.shape != key.shape:
        raise ValueError("attn_implementation fastbert: only encoders without cache are supported")
    packed = attention_mask
    if packed is None:
        packed = Packed.of(None, (query.shape[0], query.shape[2]), query.device)
    elif not isinstance(packed, Packed):
        raise ValueError(
            "attn_implementation fastbert: attention_mask must be [batch, length], got "
            f"{list(packed.shape)}"
        )
    elif packed.windowed != (sliding_window is not None):
        raise ValueError(
            "attn_implementation fastbert: the mask and sliding_window must both be of a window, "
            f"or neither, got sliding_window {sliding_window}"
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
