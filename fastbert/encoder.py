"""BERT's encoder over packed tokens: embeddings, layers, pooler (Devlin et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.packing import PackedBatch

# dropout sites of one layer
_ATTENTION, _ATTENTION_OUTPUT, _OUTPUT = range(3)


class Norm(nn.Module):
    """The weight and bias of one LayerNorm."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))


class Embeddings(nn.Module):
    """Word, position and segment embeddings, LayerNorm, dropout."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = Norm(config.hidden_size)

    def forward(self, batch: PackedBatch, rng: Rng | None) -> Tensor:
        """[tokens, hidden_size]."""
        return ops.embedding(
            batch.input_ids,
            batch.position_ids,
            batch.token_type_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.norm.weight,
            self.norm.bias,
            eps=self.config.layer_norm_eps,
            dropout_p=self.config.hidden_dropout_prob if rng else 0.0,
            rng=rng,
        )


class Layer(nn.Module):
    """One post-LN layer: attention, add and norm, feed-forward, add and norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = Norm(hidden_size)
        self.intermediate = nn.Linear(hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden_size)
        self.output_norm = Norm(hidden_size)

    def forward(
        self, hidden_states: Tensor, batch: PackedBatch, rng: Rng | None, layer: int
    ) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size]."""
        config = self.config
        hidden_dropout = config.hidden_dropout_prob if rng else 0.0
        projected = F.linear(hidden_states, self.qkv.weight, self.qkv.bias)
        context = ops.fused_qkv_attention(
            projected.view(-1, 3, config.num_attention_heads, config.head_dim),
            batch.cu_seqlens,
            layout=batch.layout,
            dropout_p=config.attention_probs_dropout_prob if rng else 0.0,
            rng=rng.at(layer, _ATTENTION) if rng else None,
        )
        # the biases of both output projections are added by layer_norm
        attended = ops.layer_norm(
            F.linear(context.flatten(1), self.attention_output.weight),
            self.attention_norm.weight,
            self.attention_norm.bias,
            x_bias=self.attention_output.bias,
            residual=hidden_states,
            eps=config.layer_norm_eps,
            dropout_p=hidden_dropout,
            rng=rng.at(layer, _ATTENTION_OUTPUT) if rng else None,
        )
        return ops.layer_norm(
            ops.feed_forward(
                attended,
                self.intermediate.weight,
                self.intermediate.bias,
                self.output.weight,
                activation=config.hidden_act,
            ),
            self.output_norm.weight,
            self.output_norm.bias,
            x_bias=self.output.bias,
            residual=attended,
            eps=config.layer_norm_eps,
            dropout_p=hidden_dropout,
            rng=rng.at(layer, _OUTPUT) if rng else None,
        )


class Encoder(nn.Module):
    """Embeddings and layers: packed token ids in, hidden states out."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, batch: PackedBatch, rng: Rng | None = None) -> Tensor:
        """Hidden states of the last layer.

        Args:
            batch: packed sequences, none longer than `max_position_embeddings`.
            rng: names this step's dropout draws; None for no dropout.

        Returns:
            [tokens, hidden_size].

        Raises:
            ValueError: a sequence is longer than the model's positions.
        """
        limit = self.config.max_position_embeddings
        if batch.max_seqlen > limit:
            raise ValueError(
                f"encoder: sequences must be at most {limit} tokens "
                f"(max_position_embeddings), got {batch.max_seqlen}"
            )
        if rng and batch.input_ids.device.type != "cpu":
            # one copy a step, not one a dropout site
            rng = rng.on(batch.input_ids.device)
        if rng and batch.sample_ids is not None:
            rows = batch.layout.rows()
            rng = rng.rows(rows.sample_ids, rows.positions)
        hidden_states = self.embeddings(batch, rng.at(0) if rng else None)
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, batch, rng, number)
        return hidden_states


def initialise(module: nn.Module, config: EncoderConfig, seed: int) -> None:
    """Draw all weights: normal with `initializer_range`, zero biases (Devlin et al. 2018).

    The published code truncates the normal at two standard deviations; so does this.
    """
    generator = torch.Generator().manual_seed(seed)
    std = config.initializer_range
    for _, child in sorted(module.named_modules()):
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(child.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
