"""What models return, and the targets that their losses are divided by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastbert.packing import PackedBatch


class Output:
    """Readable by attribute, key and position; absent values are skipped by position."""

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self.to_tuple())

    def keys(self) -> list[str]:
        """Names of the values that are there."""
        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The values that are there."""
        return tuple(getattr(self, name) for name in self.keys())


@dataclass
class BertOutput(Output):
    """What BertModel returns.

    Attributes:
        last_hidden_state: [tokens, hidden_size] packed, [batch, length, hidden_size] padded.
        pooler_output: [sequences, hidden_size]; None for families without a pooler.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


@dataclass
class TrainingOutput(Output):
    """What models with a head return; only what was asked for is computed.

    Attributes:
        loss: scalar, each objective divided by its targets, summed over objectives.
        logits: of the model's first head.
        seq_relationship_logits: [sequences, 2] of BertForPreTraining.
        start_logits, end_logits: of BertForQuestionAnswering, in place of `logits`: [tokens]
            packed, [batch, length] padded, there with the lowest number at padding.
        masked_lm_loss_sum: scalar, detached, before division; of the objective over single rows,
            masked tokens or labelled ones.
        sequence_loss_sum: the same of the objective over whole sequences.
        masked_lm_correct, sequence_correct: scalar int64.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    masked_lm_loss_sum: Tensor | None = None
    masked_lm_correct: Tensor | None = None
    sequence_loss_sum: Tensor | None = None
    sequence_correct: Tensor | None = None

    def add_loss(self, loss_sum: Tensor, targets: int | Tensor, weight: float = 1.0) -> None:
        """Add one objective, summed over its targets, to the loss as their mean."""
        count = targets if isinstance(targets, Tensor) else max(targets, 1)
        share = loss_sum / count if weight == 1.0 else loss_sum * weight / count
        self.loss = share if self.loss is None else self.loss + share

    @property
    def prediction_logits(self) -> Tensor | None:
        """`logits` under transformers' name for BertForPreTraining."""
        return self.logits

    @property
    def sop_logits(self) -> Tensor | None:
        """`seq_relationship_logits` under transformers' name for ALBERT."""
        return self.seq_relationship_logits


@dataclass(frozen=True)
class Targets:
    """Targets of one optimiser step, over all its micro-batches and ranks.

    Attributes:
        masked: of the objective over single rows: masked tokens, or labelled ones.
        labelled: of the sequence objective. Numbers, or scalar tensors of at least 1, which a
            captured CUDA graph reads anew in every step.
    """

    masked: int | Tensor = 0
    labelled: int | Tensor = 0

    @classmethod
    def of(cls, *batches: PackedBatch) -> Targets:
        """Count the targets of these batches; known on the host, no synchronisation."""
        return cls(sum(b.num_masked for b in batches), sum(b.num_labelled for b in batches))
