"""The arithmetic of one layer of transformers on packed tokens, read from its own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.linear import feed_forward, gated_feed_forward, is_hooked, is_plain, product, project
from fastbert.packed_call import Packed
from fastbert.pre_norm import PreNormSettings
from fastbert.stock_layers import Rates

# dropout sites of one layer
_ATTENTION, _ATTENTION_OUTPUT, _OUTPUT = range(3)


def post_norm_layer(
    layer: nn.Module, hidden_states: Tensor, packed: Packed, config: EncoderConfig, number: int
) -> Tensor:
    """One post-LN layer: [tokens, hidden_size] -> [tokens, hidden_size]."""
    family, rates = config.family, Rates.of(layer, config.model_type)
    part = {name: layer.get_submodule(path) for name, path in family.layer.items()}
    projections = [layer.get_submodule(path) for path in family.qkv]
    heads = (config.num_attention_heads, config.head_dim)
    attended = _attention(projections, hidden_states, packed, heads, rates.attention, number)
    attended = _add_and_norm(
        part["attention_norm"],
        product(part["attention_output"], attended),
        hidden_states,
        rates.attention_output,
        _drawn(packed, rates.attention_output, number, _ATTENTION_OUTPUT),
    )
    return _add_and_norm(
        part["output_norm"],
        feed_forward(part["intermediate"], part["output"], attended, config.hidden_act),
        attended,
        rates.output,
        _drawn(packed, rates.output, number, _OUTPUT),
    )


def _drawn(packed: Packed, dropout_p: float, number: int, site: int) -> Rng | None:
    rng = packed.draws(dropout_p)
    return rng.at(number, site) if rng else None


def _drawn_for_attention(packed: Packed, dropout_p: float, heads: int, number: int) -> Rng | None:
    rng = packed.attention_draws(dropout_p, heads)
    return rng.at(number, _ATTENTION) if rng else None


def _attention(
    projections: list[Any],
    hidden_states: Tensor,
    packed: Packed,
    heads: tuple[int, int],
    dropout_p: float,
    number: int,
) -> Tensor:
    options: dict[str, Any] = {
        "layout": packed.layout,
        "dropout_p": dropout_p,
        "rng": _drawn_for_attention(packed, dropout_p, heads[0], number),
    }
    cu_seqlens = packed.layout.cu_seqlens
    if all(is_plain(module) and module.bias is not None for module in projections):
        weight = torch.cat([module.weight for module in projections])
        bias = torch.cat([module.bias for module in projections])
        fused = ops.linear(hidden_states, weight, bias).view(-1, 3, *heads)
        return ops.fused_qkv_attention(fused, cu_seqlens, **options).flatten(1)
    # somebody's adapter or hook sits there: what it computes is theirs to say
    query, key, value = (module(hidden_states).unflatten(1, heads) for module in projections)
    return ops.attention(query, key, value, cu_seqlens, **options).flatten(1)


def pre_norm_layer(
    layer: nn.Module,
    hidden_states: Tensor,
    packed: Packed,
    config: EncoderConfig,
    settings: PreNormSettings,
    number: int,
) -> Tensor:
    """One layer of ModernBERT: [tokens, hidden_size] -> [tokens, hidden_size]."""
    part = {name: layer.get_submodule(path) for name, path in config.family.layer.items()}
    kind, rates = settings.layer_types[number - 1], Rates.of(layer, config.model_type)
    normed = part["attention_norm"](hidden_states)
    projected = project(layer.get_submodule(config.family.qkv[0]), normed)
    qkv = projected.view(-1, 3, config.num_attention_heads, config.head_dim)
    context = ops.fused_qkv_attention(
        ops.rotary(qkv, *packed.tables[kind], packed.positions()),
        packed.layout.cu_seqlens,
        layout=packed.layout,
        dropout_p=rates.attention,
        rng=_drawn_for_attention(packed, rates.attention, config.num_attention_heads, number),
        window=(settings.window,) * 2 if kind == "sliding_attention" else None,
    )
    attended = ops.dropout(
        project(part["attention_output"], context.flatten(1)),
        rates.attention_output,
        _drawn(packed, rates.attention_output, number, _ATTENTION_OUTPUT),
    )
    total = hidden_states + attended
    fed, bias = gated_feed_forward(
        part["intermediate"], part["output"], part["output_norm"](total), config.hidden_act
    )
    return total + (fed if bias is None else fed + bias)


def _add_and_norm(
    norm: nn.Module,
    product: tuple[Tensor, Tensor | None],
    residual: Tensor,
    dropout_p: float,
    rng: Rng | None,
) -> Tensor:
    x, x_bias = product
    if type(norm) is nn.LayerNorm and not is_hooked(norm):
        return ops.layer_norm(
            x,
            norm.weight,
            norm.bias,
            x_bias=x_bias,
            residual=residual,
            eps=norm.eps,
            dropout_p=dropout_p,
            rng=rng,
        )
    x = x if x_bias is None else x + x_bias
    return norm(residual + ops.dropout(x, dropout_p, rng))
