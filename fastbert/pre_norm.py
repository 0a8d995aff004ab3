"""ModernBERT's layers over packed tokens (Warner et al. 2024, arXiv:2412.13663).

The norm stands before each half of a layer, positions are rotary, the feed-forward is gated, and
most layers see a window of their neighbours alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder
from fastbert.errors import InputError
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.linear import gated_feed_forward, product, project_qkv
from fastbert.norm import Norm
from fastbert.packing import PackedBatch

# dropout sites of one layer
_ATTENTION, _ATTENTION_OUTPUT = range(2)
_THETA = {"full_attention": ("global_rope_theta", 160_000.0)}
_THETA["sliding_attention"] = ("local_rope_theta", 10_000.0)


@dataclass(frozen=True)
class PreNormSettings:
    """What config.json says beyond EncoderConfig.

    Attributes:
        layer_types: of each layer, full_attention or sliding_attention.
        thetas: the base of the rotary angles by layer type.
        window: places that a sliding layer sees on either side.
        attention_bias, mlp_bias, norm_bias, classifier_bias: whether those parts have one.
        mean_pooling: whether heads of sequences take the mean of all tokens, not the first.
    """

    layer_types: tuple[str, ...]
    thetas: Mapping[str, float]
    window: int
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool
    classifier_bias: bool
    mean_pooling: bool

    @classmethod
    def of(cls, config: EncoderConfig) -> PreNormSettings:
        """Read the fields that the configuration keeps for its family.

        Raises:
            InputError: a rotary scaling, dropout or layer that is not supported.
        """
        raw = config.extra
        depth = config.num_hidden_layers
        every = raw.get("global_attn_every_n_layers", 3)
        kinds = raw.get("layer_types") or [
            "sliding_attention" if number % every else "full_attention" for number in range(depth)
        ]
        if len(kinds) != depth or set(kinds) - set(_THETA):
            raise InputError(
                f"config: layer_types must be {depth} of {', '.join(_THETA)}, got {kinds}"
            )
        if raw.get("mlp_dropout") or not raw.get("decoder_bias", True):
            raise InputError("config: mlp_dropout must be 0 and decoder_bias true")
        if raw.get("rope_scaling"):
            raise InputError(f"config: rope_scaling must be none, got {raw['rope_scaling']!r}")
        pooling = raw.get("classifier_pooling", "cls")
        if pooling not in ("cls", "mean"):
            raise InputError(f"config: classifier_pooling must be cls or mean, got {pooling!r}")
        return cls(
            tuple(kinds),
            {kind: _theta(raw, kind) for kind in _THETA},
            int(raw.get("local_attention", 128)) // 2,
            bool(raw.get("attention_bias", False)),
            bool(raw.get("mlp_bias", False)),
            bool(raw.get("norm_bias", False)),
            bool(raw.get("classifier_bias", False)),
            pooling == "mean",
        )


def _theta(raw: Mapping[str, Any], kind: str) -> float:
    own = (raw.get("rope_parameters") or {}).get(kind) or {}
    if own.get("rope_type", "default") != "default":
        raise InputError(f"config: rope_type must be default, got {own['rope_type']!r}")
    name, default = _THETA[kind]
    theta = own.get("rope_theta", raw.get(name))
    return float(default if theta is None else theta)


def rotary_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [positions, head_dim // 2] fp32 each (Su et al., arXiv:2104.09864)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)
    angles = torch.arange(positions, dtype=torch.float)[:, None] * frequencies
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """The tables of both layer types; angles stay in fp32, whatever the model's dtype."""

    def __init__(self, config: EncoderConfig, settings: PreNormSettings) -> None:
        super().__init__()
        for kind, theta in settings.thetas.items():
            cos, sin = rotary_tables(config.max_position_embeddings, config.head_dim, theta)
            self.register_buffer(f"cos_{kind}", cos, persistent=False)
            self.register_buffer(f"sin_{kind}", sin, persistent=False)

    def forward(self, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer type."""
        return getattr(self, f"cos_{kind}"), getattr(self, f"sin_{kind}")

    def _apply(self, change: Any, recurse: bool = True) -> RotaryTables:
        tables = dict(self.named_buffers())
        super()._apply(change, recurse)
        for name, moved in dict(self.named_buffers()).items():
            if moved.dtype != torch.float32:
                setattr(self, name, tables[name].to(moved.device))
        return self


class TokenEmbeddings(nn.Module):
    """Word embeddings, LayerNorm, dropout; positions are the attention's business."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = PreNormSettings.of(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = Norm(config.hidden_size, has_bias=settings.norm_bias)

    def forward(self, batch: PackedBatch, rng: Rng | None) -> Tensor:
        """[tokens, hidden_size]."""
        states = ops.layer_norm(
            F.embedding(
                batch.input_ids,
                self.word_embeddings.weight,
                sparse=self.word_embeddings.sparse,
            ),
            self.norm.weight,
            self.norm.bias,
            eps=self.config.layer_norm_eps,
        )
        return ops.dropout(states, self.config.hidden_dropout_prob if rng else 0.0, rng)


class PreNormLayer(nn.Module):
    """One layer's parameters; the first has no norm before its attention."""

    def __init__(self, config: EncoderConfig, settings: PreNormSettings, number: int) -> None:
        super().__init__()
        self.config = config
        hidden_size, inner = config.hidden_size, config.intermediate_size
        kind = settings.layer_types[number]
        self.kind = kind
        self.window = (settings.window, settings.window) if kind == "sliding_attention" else None
        if number:
            self.attention_norm = Norm(hidden_size, has_bias=settings.norm_bias)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=settings.attention_bias)
        self.attention_output = nn.Linear(hidden_size, hidden_size, bias=settings.attention_bias)
        self.output_norm = Norm(hidden_size, has_bias=settings.norm_bias)
        self.intermediate = nn.Linear(hidden_size, 2 * inner, bias=settings.mlp_bias)
        self.output = nn.Linear(inner, hidden_size, bias=settings.mlp_bias)

    def attend(
        self,
        normed: Tensor,
        batch: PackedBatch,
        tables: tuple[Tensor, Tensor],
        rng: Rng | None,
        number: int,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[tokens, hidden_size] -> the same or these rows alone, and the bias still to be added."""
        config = self.config
        projected = project_qkv(self.qkv, normed, rows).view(
            -1, 3, config.num_attention_heads, config.head_dim
        )
        context = ops.fused_qkv_attention(
            ops.rotary(projected, *tables, batch.position_ids),
            batch.cu_seqlens,
            layout=batch.layout,
            dropout_p=config.attention_probs_dropout_prob if rng else 0.0,
            rng=rng.at(number, _ATTENTION) if rng else None,
            window=self.window,
        )
        if rows is not None:
            # what follows works on each row by itself
            context = context.index_select(0, rows)
        return product(self.attention_output, context.flatten(1))


class PreNormEncoder(Encoder):
    """Embeddings, layers and the last norm; every sum and the norm after it are one operator."""

    def __init__(self, config: EncoderConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        settings = PreNormSettings.of(config)
        self.embeddings = TokenEmbeddings(config)  # type: ignore[assignment]
        self.layers = nn.ModuleList(
            PreNormLayer(config, settings, number) for number in range(config.num_hidden_layers)
        )
        self.final_norm = Norm(config.hidden_size, has_bias=settings.norm_bias)
        self.tables = RotaryTables(config, settings)
        self.recompute = False

    def forward(
        self, batch: PackedBatch, rng: Rng | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Arguments, result and errors are those of Encoder."""
        rng = self.prepared(batch, rng)
        normed = total = self.embeddings(batch, rng.at(0) if rng else None)
        layers: list[Any] = list(self.layers)
        norms = [layer.attention_norm for layer in layers[1:]] + [self.final_norm]
        for number, (layer, norm_after) in enumerate(zip(layers, norms, strict=True), start=1):
            chosen = rows if number == len(layers) else None
            inputs = (layer, norm_after, normed, total, batch, rng, number, chosen)
            if self.recompute and torch.is_grad_enabled():
                normed, total = checkpoint(
                    self._step, *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                normed, total = self._step(*inputs)
        return normed

    def _step(
        self,
        layer: Any,
        norm_after: Norm,
        normed: Tensor,
        total: Tensor,
        batch: PackedBatch,
        rng: Rng | None,
        number: int,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One layer and the norm after it: the normed rows, and the sum they were made of."""
        config = self.config
        attended, bias = layer.attend(normed, batch, self.tables(layer.kind), rng, number, rows)
        if rows is not None:
            total = total.index_select(0, rows)
            rng = rng.select(rows) if rng else None
        normed, total = ops.layer_norm_with_sum(
            attended,
            layer.output_norm.weight,
            layer.output_norm.bias,
            x_bias=bias,
            residual=total,
            eps=config.layer_norm_eps,
            dropout_p=config.attention_probs_dropout_prob if rng else 0.0,
            rng=rng.at(number, _ATTENTION_OUTPUT) if rng else None,
        )
        fed, bias = gated_feed_forward(layer.intermediate, layer.output, normed, config.hidden_act)
        return ops.layer_norm_with_sum(
            fed,
            norm_after.weight,
            norm_after.bias,
            x_bias=bias,
            residual=total,
            eps=config.layer_norm_eps,
        )
