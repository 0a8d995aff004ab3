"""What sits on the encoder: pooler, masked-LM head, projections of sequences and tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.family import Pooling
from fastbert.kernels import ops
from fastbert.kernels.ops import CrossEntropy, Rng
from fastbert.norm import Norm
from fastbert.pre_norm import PreNormSettings

# dropout coordinates past any encoder layer
HEAD_LAYER = 1 << 20


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}
# dropout sites of a head
_BEFORE_POOLER, _BEFORE_PROJECTION = 1, 0


class Pooler(nn.Module):
    """A dense layer over each sequence's first token, and tanh (Devlin et al. 2018).

    Other families put another function there, or dropout in front.
    """

    def __init__(
        self, config: EncoderConfig, pooling: Pooling | None = None, dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        self.pooling = pooling or Pooling()
        self.dropout_p = dropout_p if self.pooling.dropout_before else 0.0
        self.eps = config.layer_norm_eps
        settings = PreNormSettings.of(config) if self.pooling.has_norm else None
        has_bias = settings is None or settings.classifier_bias
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=has_bias)
        if settings is not None:
            self.norm = Norm(config.hidden_size, has_bias=settings.norm_bias)

    def forward(self, first_states: Tensor, rng: Rng | None = None) -> Tensor:
        """[sequences, hidden_size] -> [sequences, hidden_size]."""
        kept = dropped(first_states, self.dropout_p, rng, _BEFORE_POOLER)
        dense = ops.linear(kept, self.dense.weight, self.dense.bias)
        states = _ACTIVATIONS[self.pooling.activation](dense)
        if not self.pooling.has_norm:
            return states
        return ops.layer_norm(states, self.norm.weight, self.norm.bias, eps=self.eps)


class MaskedLMHead(nn.Module):
    """dense, GELU, LayerNorm, then the word embedding as decoder, with a bias of its own."""

    def __init__(self, config: EncoderConfig, activation: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.activation = activation or config.hidden_act
        # the decoder is the word embedding, so its width is that of the embeddings
        has_bias, norm_has_bias = True, True
        if config.family.pre_norm:
            settings = PreNormSettings.of(config)
            has_bias, norm_has_bias = settings.classifier_bias, settings.norm_bias
        self.dense = nn.Linear(config.hidden_size, config.embedding_width, bias=has_bias)
        self.norm = Norm(config.embedding_width, has_bias=norm_has_bias)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, embedding width]."""
        approximate = "tanh" if self.activation == "gelu_new" else "none"
        dense = ops.linear(hidden_states, self.dense.weight, self.dense.bias)
        return ops.layer_norm(
            F.gelu(dense, approximate=approximate),
            self.norm.weight,
            self.norm.bias,
            eps=self.config.layer_norm_eps,
        )

    def forward(self, hidden_states: Tensor, word_weight: Tensor) -> Tensor:
        """Logits: [rows, hidden_size] -> [rows, vocab_size]."""
        return ops.linear(self.transform(hidden_states), word_weight, self.bias)

    def loss(
        self, hidden_states: Tensor, masked_positions: Tensor, labels: Tensor, word_weight: Tensor
    ) -> CrossEntropy:
        """Summed loss over the masked rows alone; [tokens, hidden_size], [masked], [masked]."""
        return ops.masked_lm_loss(
            hidden_states,
            masked_positions,
            labels,
            self.dense.weight,
            self.dense.bias,
            self.norm.weight,
            self.norm.bias,
            word_weight,
            self.bias,
            activation=self.activation,
            eps=self.config.layer_norm_eps,
        )


class Projection(nn.Module):
    """Dropout and the last projection: of pooled sequences, or of every token."""

    def __init__(self, config: EncoderConfig, outputs: int, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.dense = nn.Linear(config.hidden_size, outputs)

    def forward(self, states: Tensor, rng: Rng | None = None) -> Tensor:
        """[rows, hidden_size] -> [rows, outputs] logits."""
        kept = dropped(states, self.dropout_p, rng)
        return F.linear(kept, self.dense.weight, self.dense.bias)


class DetectionHead(nn.Module):
    """dense, GELU, one number a token: was it replaced (Clark et al. 2020)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows] logits, positive for replaced tokens."""
        approximate = "tanh" if self.activation == "gelu_new" else "none"
        dense = ops.linear(hidden_states, self.dense.weight, self.dense.bias)
        activated = F.gelu(dense, approximate=approximate)
        return F.linear(activated, self.projection.weight, self.projection.bias).squeeze(-1)


def dropped(
    states: Tensor, dropout_p: float, rng: Rng | None, site: int = _BEFORE_PROJECTION
) -> Tensor:
    """Dropout in a head; the states themselves without an rng."""
    if rng is None or dropout_p == 0.0:
        return states
    return ops.dropout(states, dropout_p, rng.at(HEAD_LAYER, site))
