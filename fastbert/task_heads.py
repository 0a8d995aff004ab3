"""Task heads that transformers has no class for; their weights lie in a file beside the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.heads import HEAD_LAYER
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.models import Model

HEAD_FILE = "head.safetensors"
H = TypeVar("H", bound=nn.Module)
# dropout sites of a head
_FIRST, _SECOND = 0, 1
# what an impossible transition scores: far below any that training makes
FORBIDDEN = -100.0


class WithHead(nn.Module):
    """A model of transformers' layout, and one more head on it.

    Args:
        body: of `fastbert.models`; its folder is one that transformers loads.
        head: of this file.
    """

    def __init__(self, body: Model, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    @property
    def config(self) -> EncoderConfig:
        """The body's."""
        return self.body.config

    @property
    def word_weight(self) -> Tensor:
        """The word embedding."""
        return self.body.word_weight

    def save_pretrained(self, folder: Path) -> None:
        """Write the body in Hugging Face's layout, and the head beside it."""
        self.body.save_pretrained(folder)
        tensors = {
            name: t.detach().cpu().contiguous() for name, t in self.head.state_dict().items()
        }
        with atomic_write(folder / HEAD_FILE, "wb") as file:
            file.write(save(tensors, metadata={"format": "pt"}))


def load_head(head: H, folder: Path) -> H:
    """Fill a head with what `save_pretrained` wrote.

    Raises:
        InputError: no such file, or one of another head.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; the task's head is in it")
    try:
        head.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: damaged, or of another head: {reason}") from None
    return head


def drawn(head: H, config: EncoderConfig, seed: int) -> H:
    """Fresh weights as the encoder's are drawn."""
    generator = torch.Generator().manual_seed(seed)
    std = config.initializer_range
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(
                module.weight, std=std, a=-2 * std, b=2 * std, generator=generator
            )
            nn.init.zeros_(module.bias)
    return head


class RelationHead(nn.Module):
    """Both entities' marker states side by side, projected (Soares et al. 2019, [E1; E2])."""

    def __init__(self, config: EncoderConfig, labels: int) -> None:
        super().__init__()
        self.dropout_p = config.classifier_dropout_prob
        self.dense = nn.Linear(2 * config.hidden_size, labels)

    def forward(self, hidden_states: Tensor, places: Tensor, rng: Rng | None) -> Tensor:
        """[tokens, hidden_size] and [sequences, 2] rows -> [sequences, labels] logits."""
        pairs = hidden_states[places].flatten(1)
        return _project(self.dense, pairs, self.dropout_p, rng, _FIRST)


class IntentHead(nn.Module):
    """A class a sequence from its first token, and a class a token (Chen et al. 2019)."""

    def __init__(self, config: EncoderConfig, intents: int, slots: int) -> None:
        super().__init__()
        self.dropout_p = config.classifier_dropout_prob
        self.intent = nn.Linear(config.hidden_size, intents)
        self.slot = nn.Linear(config.hidden_size, slots)

    def forward(
        self, hidden_states: Tensor, pooled: Tensor, rng: Rng | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [sequences, intents] of [sequences, hidden_size], and [tokens, slots]."""
        return (
            _project(self.intent, pooled, self.dropout_p, rng, _FIRST),
            _project(self.slot, hidden_states, self.dropout_p, rng, _SECOND),
        )


class TransitionScores(nn.Module):
    """Scores of tags side by side: a linear-chain conditional random field (Lafferty et al. 2001).

    Attributes:
        transitions: [tags + 2, tags]: from each tag, from the start; the last row to the end.
    """

    def __init__(self, tags: int, allowed: Tensor | None = None) -> None:
        """`allowed`, [tags + 2, tags] bool, forbids what its scheme cannot have."""
        super().__init__()
        scores = torch.zeros(tags + 2, tags)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, FORBIDDEN)
        self.transitions = nn.Parameter(scores)

    def forward(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Summed negative log-likelihood.

        Args:
            emissions: [sequences, longest, tags], anything past a sequence's length.
            tags: [sequences, longest] int64.
            lengths: [sequences]; a sequence of none costs nothing.
        """
        inner, start, end = self.transitions[:-2], self.transitions[-2], self.transitions[-1]
        emissions = emissions.to(torch.promote_types(emissions.dtype, torch.float32))
        alpha = start + emissions[:, 0]
        score = alpha.gather(1, tags[:, :1]).squeeze(1)
        for place in range(1, emissions.shape[1]):
            here = (place < lengths)[:, None]
            # log-sum over the tag before
            step = torch.logsumexp(alpha[:, :, None] + inner, dim=1) + emissions[:, place]
            alpha = torch.where(here, step, alpha)
            gained = inner[tags[:, place - 1], tags[:, place]] + emissions[:, place].gather(
                1, tags[:, place, None]
            ).squeeze(1)
            score = score + gained * here.squeeze(1)
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
        total = torch.logsumexp(alpha + end, dim=1)
        return ((total - score - end[last]) * (lengths > 0)).sum()


def _project(dense: nn.Linear, states: Tensor, dropout_p: float, rng: Any, site: int) -> Tensor:
    if rng is not None and dropout_p:
        states = ops.dropout(states, dropout_p, rng.at(HEAD_LAYER, site))
    return F.linear(states, dense.weight, dense.bias)
