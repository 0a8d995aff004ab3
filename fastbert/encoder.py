"""BERT's encoder over packed tokens: embeddings, layers, pooler (Devlin et al. 2018)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import EncoderConfig
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.linear import feed_forward, product, project, project_qkv
from fastbert.norm import Norm
from fastbert.packing import PackedBatch

# where more of the rows are read, gathering them costs more than it saves
MOST_SELECTED = 0.5
# dropout sites of one layer
_ATTENTION, _ATTENTION_OUTPUT, _OUTPUT = range(3)


class Embeddings(nn.Module):
    """Word, position and segment embeddings, LayerNorm, dropout."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        # a single segment is the segment of every token, whatever the batch says
        self.has_segments = config.family.has_segments and config.type_vocab_size > 1
        if config.family.has_segments:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        else:
            self.register_buffer("no_segment", torch.zeros(1, width), persistent=False)
        self.norm = Norm(width)

    def forward(self, batch: PackedBatch, rng: Rng | None) -> Tensor:
        """[tokens, embedding width]."""
        position_ids, token_type_ids = batch.position_ids, batch.token_type_ids
        if self.config.position_offset:
            position_ids = position_ids + self.config.position_offset
        if not self.has_segments:
            token_type_ids = torch.zeros_like(token_type_ids)
        return ops.embedding(
            batch.input_ids,
            position_ids,
            token_type_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.segment_weight,
            self.norm.weight,
            self.norm.bias,
            layout=batch.layout,
            eps=self.config.layer_norm_eps,
            dropout_p=self.config.hidden_dropout_prob if rng else 0.0,
            rng=rng,
            sparse=self.word_embeddings.sparse,
        )

    @property
    def segment_weight(self) -> Tensor:
        """[segments, embedding width]; zeros in families without segments."""
        if self.config.family.has_segments:
            return self.token_type_embeddings.weight
        return self.no_segment  # type: ignore[return-value]


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
        family, hidden_dropout = config.family, config.hidden_dropout_prob
        self.dropout_ps = (
            hidden_dropout * family.attention_output_dropout,
            hidden_dropout * family.output_dropout,
        )

    def forward(
        self,
        hidden_states: Tensor,
        batch: PackedBatch,
        rng: Rng | None,
        layer: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[tokens, hidden_size] -> [tokens, hidden_size], or of these rows alone."""
        config = self.config
        attention_dropout, output_dropout = self.dropout_ps if rng else (0.0, 0.0)
        projected = project_qkv(self.qkv, hidden_states, rows)
        context = ops.fused_qkv_attention(
            projected.view(-1, 3, config.num_attention_heads, config.head_dim),
            batch.cu_seqlens,
            layout=batch.layout,
            dropout_p=config.attention_probs_dropout_prob if rng else 0.0,
            rng=rng.at(layer, _ATTENTION) if rng else None,
        )
        if rows is not None:
            # what follows works on each row by itself
            context, hidden_states = (t.index_select(0, rows) for t in (context, hidden_states))
            rng = rng.select(rows) if rng else None
        # the biases of both output projections are added by layer_norm, or by the products
        output, output_bias = product(self.attention_output, context.flatten(1))
        attended = ops.layer_norm(
            output,
            self.attention_norm.weight,
            self.attention_norm.bias,
            x_bias=output_bias,
            residual=hidden_states,
            eps=config.layer_norm_eps,
            dropout_p=attention_dropout,
            rng=rng.at(layer, _ATTENTION_OUTPUT) if rng else None,
        )
        output, output_bias = feed_forward(
            self.intermediate, self.output, attended, config.hidden_act
        )
        return ops.layer_norm(
            output,
            self.output_norm.weight,
            self.output_norm.bias,
            x_bias=output_bias,
            residual=attended,
            eps=config.layer_norm_eps,
            dropout_p=output_dropout,
            rng=rng.at(layer, _OUTPUT) if rng else None,
        )


class Encoder(nn.Module):
    """Embeddings and layers: packed token ids in, hidden states out.

    Attributes:
        recompute: keep only the input of each layer for the backward pass, and compute the layer
            once more there (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        # wherever their files hold a projection, even one between equal widths
        self.projection: nn.Linear | None = None
        if has_projection(config):
            self.projection = nn.Linear(config.embedding_width, config.hidden_size)
        self.order = layer_order(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(self.order) + 1))
        self.recompute = False

    def forward(
        self, batch: PackedBatch, rng: Rng | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states of the last layer.

        Args:
            batch: packed sequences, none longer than the configuration's `max_seqlen`.
            rng: names this step's dropout draws; None for no dropout.
            rows: [selected] int64; the last layer's query, output projection and feed-forward are
                computed for these tokens alone. None for all.

        Returns:
            [tokens, hidden_size], or [selected, hidden_size].

        Raises:
            ValueError: a sequence is longer than the model's positions.
        """
        rng = self.prepared(batch, rng)
        hidden_states = self.embeddings(batch, rng.at(0) if rng else None)
        if self.projection is not None:
            hidden_states = project(self.projection, hidden_states)
        for number, index in enumerate(self.order, start=1):
            last = number == len(self.order)
            inputs = (hidden_states, batch, rng, number, rows if last else None)
            if self.recompute and torch.is_grad_enabled():
                # dropout is drawn by coordinates: nothing of torch's generators is to be kept
                hidden_states = checkpoint(
                    self.layers[index], *inputs, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_states = self.layers[index](*inputs)
        return hidden_states

    def prepared(self, batch: PackedBatch, rng: Rng | None) -> Rng | None:
        """The draw with this batch's coordinates.

        Raises:
            ValueError: a sequence is longer than the model's positions.
        """
        limit = self.config.max_seqlen
        if batch.max_seqlen > limit:
            raise ValueError(
                f"encoder: sequences must be at most {limit} tokens "
                f"(max_position_embeddings), got {batch.max_seqlen}"
            )
        if rng and batch.input_ids.device.type != "cpu":
            # one copy a step, not one a dropout site
            rng = rng.on(batch.input_ids.device)
        if rng and batch.sample_ids is not None:
            of_stream = batch.layout.rows()
            rng = rng.rows(of_stream.sample_ids, of_stream.positions)
        if rng and self.config.attention_probs_dropout_prob > 0.0:
            heads = self.config.num_attention_heads
            rng = ops.with_attention_words(rng, batch.capacity, heads, batch.input_ids.device)
        return rng

    def selected(
        self, batch: PackedBatch, rng: Rng | None, *, masked: bool = False, first: bool = False
    ) -> tuple[Tensor, PackedBatch]:
        """Hidden states of the rows that a loss reads, and the batch as it lies in them.

        Args:
            batch, rng: as for the call itself.
            masked: the masked positions are read.
            first: the first token of each sequence is read.

        Returns:
            [rows, hidden_size], and the batch whose `masked_positions` and `first_tokens` count
            in those rows. Where they are not few, all rows and the batch itself.
        """
        masked_positions = batch.masked_positions if masked else None
        parts = [] if masked_positions is None else [masked_positions]
        parts += [batch.first_tokens] if first else []
        rows = torch.cat(parts) if parts else None
        if rows is None or len(rows) > MOST_SELECTED * batch.capacity:
            return self(batch, rng), batch
        place = torch.arange(len(rows), device=rows.device)
        shorter = dataclasses.replace(batch)
        shorter.masked_positions = None if masked_positions is None else place[: len(parts[0])]
        # the first tokens come last
        shorter.__dict__["first_tokens"] = place[len(rows) - len(batch.first_tokens) :]
        return self(batch, rng, rows), shorter


def has_projection(config: EncoderConfig) -> bool:
    """Whether a linear layer stands between the embeddings and the layers."""
    if config.family.projection is None:
        return False
    # layers that share weights come from ALBERT, which projects always
    return config.num_hidden_groups is not None or config.embedding_width != config.hidden_size


def layer_order(config: EncoderConfig) -> list[int]:
    """Which layer's weights each step of the encoder uses (Lan et al. 2019, arXiv:1909.11942)."""
    depth, inner = config.num_hidden_layers, config.inner_group_num
    groups = config.num_hidden_groups or depth
    # their own rounding decides where the depth is no multiple of the groups
    group_of = [int(step / (depth / groups)) for step in range(depth)]
    return [group * inner + layer for group in group_of for layer in range(inner)]


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
