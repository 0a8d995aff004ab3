"""What sits on the encoder: pooler, masked-LM head, classification of sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.encoder import Norm
from fastbert.kernels import ops
from fastbert.kernels.ops import CrossEntropy, Rng

# dropout coordinates past any encoder layer
HEAD_LAYER = 1 << 20


class Pooler(nn.Module):
    """tanh of a projection of each sequence's first token (Devlin et al. 2018)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_states: Tensor) -> Tensor:
        """[sequences, hidden_size] -> [sequences, hidden_size]."""
        return torch.tanh(F.linear(first_states, self.dense.weight, self.dense.bias))


class MaskedLMHead(nn.Module):
    """dense, GELU, LayerNorm, then the word embedding as decoder, with a bias of its own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = Norm(config.hidden_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, hidden_size]."""
        approximate = "tanh" if self.config.hidden_act == "gelu_new" else "none"
        dense = F.linear(hidden_states, self.dense.weight, self.dense.bias)
        return ops.layer_norm(
            F.gelu(dense, approximate=approximate),
            self.norm.weight,
            self.norm.bias,
            eps=self.config.layer_norm_eps,
        )

    def forward(self, hidden_states: Tensor, word_weight: Tensor) -> Tensor:
        """Logits: [rows, hidden_size] -> [rows, vocab_size]."""
        return F.linear(self.transform(hidden_states), word_weight, self.bias)

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
            activation=self.config.hidden_act,
            eps=self.config.layer_norm_eps,
        )


class SequenceClassifier(nn.Module):
    """Dropout and a projection of the pooled first token."""

    def __init__(self, config: EncoderConfig, num_labels: int) -> None:
        super().__init__()
        self.dropout_p = config.classifier_dropout_prob
        self.dense = nn.Linear(config.hidden_size, num_labels)

    def forward(self, pooled: Tensor, rng: Rng | None) -> Tensor:
        """[sequences, hidden_size] -> [sequences, num_labels] logits."""
        dropped = ops.dropout(
            pooled, self.dropout_p if rng else 0.0, rng.at(HEAD_LAYER) if rng else None
        )
        return F.linear(dropped, self.dense.weight, self.dense.bias)
