"""BERT with and without heads: packed and padded calls, Hugging Face's files in and out."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import checkpoint
from fastbert.config import EncoderConfig
from fastbert.encoder import Encoder, initialise
from fastbert.errors import InputError
from fastbert.heads import MaskedLMHead, Pooler, SequenceClassifier
from fastbert.kernels.ops import Rng
from fastbert.packing import IGNORE_INDEX, PackedBatch, pack, unpack

M = TypeVar("M", bound="Model")


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """The model folder of a run, or `path` itself where it is one.

    Raises:
        InputError: neither.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(f"{path}: no model here: config.json is in neither it nor its model folder")


class Output:
    """Readable by attribute, key and position; absent values are skipped by position."""

    def __getitem__(self, key: str | int) -> Tensor:
        if isinstance(key, str):
            return getattr(self, key)  # type: ignore[no-any-return]
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        present = [getattr(self, f.name) for f in fields]
        return [value for value in present if value is not None][key]


@dataclass
class BertOutput(Output):
    """What BertModel returns.

    Attributes:
        last_hidden_state: [tokens, hidden_size] packed, [batch, length, hidden_size] padded.
        pooler_output: [sequences, hidden_size].
    """

    last_hidden_state: Tensor
    pooler_output: Tensor


@dataclass
class TrainingOutput(Output):
    """What models with a head return; only what was asked for is computed.

    Attributes:
        loss: scalar, each objective divided by its targets, summed over objectives.
        logits: of the model's first head.
        seq_relationship_logits: [sequences, 2] of BertForPreTraining.
        masked_lm_loss_sum, sequence_loss_sum: scalars, detached, before division.
        masked_lm_correct, sequence_correct: scalar int64.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    masked_lm_loss_sum: Tensor | None = None
    masked_lm_correct: Tensor | None = None
    sequence_loss_sum: Tensor | None = None
    sequence_correct: Tensor | None = None

    @property
    def prediction_logits(self) -> Tensor | None:
        """`logits` under transformers' name for BertForPreTraining."""
        return self.logits


@dataclass(frozen=True)
class Targets:
    """Targets of one optimiser step, over all its micro-batches and ranks.

    Attributes:
        masked: of the masked-LM objective.
        labelled: of the sequence objective. Numbers, or scalar tensors of at least 1, which a
            captured CUDA graph reads anew in every step.
    """

    masked: int | Tensor = 0
    labelled: int | Tensor = 0

    @classmethod
    def of(cls, *batches: PackedBatch) -> Targets:
        """Count the targets of these batches; known on the host, no synchronisation."""
        return cls(sum(b.num_masked for b in batches), sum(b.num_labelled for b in batches))


class Model(nn.Module):
    """What all models share: an encoder, files, and the padded call at the edge."""

    encoder: Encoder
    has_head: ClassVar[bool] = True
    # of the masked-LM and of the sequence objective, in their sum
    loss_weights: tuple[float, float] = (1.0, 1.0)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    @classmethod
    def from_config(cls: type[M], config: EncoderConfig, seed: int = 0) -> M:
        """A model with fresh weights, drawn from `seed`."""
        model = cls(config)
        initialise(model, config, seed)
        return model

    @classmethod
    def from_pretrained(
        cls: type[M],
        folder: str | os.PathLike[str],
        *,
        config: EncoderConfig | None = None,
        new_heads: bool = False,
        seed: int = 0,
    ) -> M:
        """Read a folder in Hugging Face's layout (config.json, model.safetensors).

        Args:
            folder: a local folder.
            config: replaces the folder's, e.g. with other labels or dropout.
            new_heads: draw what the checkpoint lacks besides the encoder from `seed`, instead of
                refusing; `model.fresh_parameters` then names it.
            seed: of fresh weights.

        Raises:
            InputError: missing, damaged or foreign files.
        """
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder; expected a saved model's folder")
        config = config or EncoderConfig.from_pretrained(folder)
        checkpoint.refuse_other_sizes(folder, config)
        model = cls.from_config(config, seed)
        where = str(Path(folder) / checkpoint.WEIGHTS_FILE)
        state, missing = checkpoint.from_hugging_face(
            checkpoint.read_weights(folder), model.state_dict(), where
        )
        of_encoder = [name for name in missing if name.startswith("encoder.")]
        if of_encoder or (missing and not new_heads):
            names = [checkpoint.hugging_face_names(n, "bert.")[0] for n in of_encoder or missing]
            raise InputError(
                f"{where}: no {checkpoint.summarise(names)}: not a checkpoint of {cls.__name__}"
            )
        model.load_state_dict(state, strict=False)
        model.fresh_parameters = missing  # type: ignore[assignment]
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, as transformers reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        prefix = "bert." if self.has_head else ""
        checkpoint.write_weights(folder, checkpoint.to_hugging_face(self.state_dict(), prefix))
        self.config.save_pretrained(folder, architecture=type(self).__name__)

    @property
    def word_weight(self) -> Tensor:
        """The word embedding, which is also the masked-LM decoder."""
        return self.encoder.embeddings.word_embeddings.weight


class BertModel(Model):
    """The encoder with its pooler."""

    has_head = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        rng: Rng | None = None,
    ) -> BertOutput:
        """Hidden states, packed for a PackedBatch, padded (zeros at padding) for padded ids.

        Args:
            input_ids: a PackedBatch, or [batch, length] integers.
            attention_mask, token_type_ids: [batch, length], with padded ids only.
            rng: names this step's dropout draws; None for no dropout.
        """
        batch, rows, shape = _packed(input_ids, attention_mask, token_type_ids)
        hidden_states = self.encoder(batch, rng)
        pooled = self.pooler(hidden_states[batch.first_tokens])
        if rows is not None and shape is not None:
            hidden_states = unpack(hidden_states, rows, shape)
        return BertOutput(hidden_states, pooled)


class BertForPreTraining(Model):
    """Masked-LM head and a two-way head on the pooled first token (NSP, or sentence order)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.masked_lm = MaskedLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, config.pair_classes)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        rng: Rng | None = None,
        targets: Targets | None = None,
    ) -> TrainingOutput:
        """Losses where the batch carries labels, logits of both heads where it carries none.

        Args:
            input_ids: a PackedBatch, or [batch, length] integers.
            attention_mask, token_type_ids: [batch, length], with padded ids only.
            labels: [batch, length], -100 where there is no target.
            next_sentence_label: [batch].
            rng: names this step's dropout draws; None for no dropout.
            targets: of the whole optimiser step; None for this batch's own.
        """
        batch, rows, shape = _packed(input_ids, attention_mask, token_type_ids)
        if rows is not None:
            _add_labels(batch, rows, labels, next_sentence_label)
        scored = batch.labels is not None or batch.sequence_labels is not None
        hidden_states, batch = self.encoder.selected(
            batch, rng, masked=batch.labels is not None, first=scored
        )
        pooled = self.pooler(hidden_states[batch.first_tokens])
        relationship = F.linear(pooled, self.next_sentence.weight, self.next_sentence.bias)
        output = TrainingOutput(seq_relationship_logits=relationship)
        targets = targets or Targets.of(batch)
        if batch.labels is None and batch.sequence_labels is None:
            output.logits = self.masked_lm(hidden_states, self.word_weight)
            if rows is not None and shape is not None:
                output.logits = unpack(output.logits, rows, shape)
        if batch.labels is not None:
            _masked_lm_loss(self, hidden_states, batch, targets, output)
        if batch.sequence_labels is not None:
            labels, weight = batch.sequence_labels, self.loss_weights[1]
            _sequence_loss(relationship, labels, targets, output, weight)
        return output


class BertForMaskedLM(Model):
    """The masked-LM head alone."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.masked_lm = MaskedLMHead(config)

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        rng: Rng | None = None,
        targets: Targets | None = None,
    ) -> TrainingOutput:
        """The loss where there are labels, else logits; arguments as for BertForPreTraining."""
        batch, rows, shape = _packed(input_ids, attention_mask, token_type_ids)
        if rows is not None:
            _add_labels(batch, rows, labels, None)
        hidden_states, batch = self.encoder.selected(batch, rng, masked=batch.labels is not None)
        output = TrainingOutput()
        if batch.labels is not None:
            _masked_lm_loss(self, hidden_states, batch, targets or Targets.of(batch), output)
            return output
        output.logits = self.masked_lm(hidden_states, self.word_weight)
        if rows is not None and shape is not None:
            output.logits = unpack(output.logits, rows, shape)
        return output


class BertForSequenceClassification(Model):
    """One class a sequence, from the pooled first token; `config.labels` names the classes."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        if len(config.labels) < 2:
            raise InputError(f"config: a classifier needs at least 2 labels, got {config.labels}")
        self.pooler = Pooler(config)
        self.classifier = SequenceClassifier(config, len(config.labels))

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        rng: Rng | None = None,
        targets: Targets | None = None,
    ) -> TrainingOutput:
        """Logits [sequences, labels], and the loss where there are labels.

        Args:
            input_ids: a PackedBatch (labels in its `sequence_labels`), or [batch, length] integers.
            attention_mask, token_type_ids: [batch, length], with padded ids only.
            labels: [batch].
            rng: names this step's dropout draws; None for no dropout.
            targets: of the whole optimiser step; None for this batch's own.
        """
        batch, rows, _ = _packed(input_ids, attention_mask, token_type_ids)
        if rows is not None:
            _add_labels(batch, rows, None, labels)
        hidden_states, batch = self.encoder.selected(batch, rng, first=True)
        logits = self.classifier(self.pooler(hidden_states[batch.first_tokens]), rng)
        output = TrainingOutput(logits=logits)
        if batch.sequence_labels is not None:
            _sequence_loss(logits, batch.sequence_labels, targets or Targets.of(batch), output)
        return output


def _packed(
    input_ids: Tensor | PackedBatch, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> tuple[PackedBatch, Tensor | None, tuple[int, int] | None]:
    if isinstance(input_ids, PackedBatch):
        if attention_mask is not None or token_type_ids is not None:
            raise ValueError("a PackedBatch carries its own segments and needs no attention_mask")
        return input_ids, None, None
    batch, rows = pack(input_ids, attention_mask, token_type_ids)
    return batch, rows, (input_ids.shape[0], input_ids.shape[1])


def _add_labels(
    batch: PackedBatch, rows: Tensor, labels: Tensor | None, sequence_labels: Tensor | None
) -> None:
    if labels is not None:
        flat = labels.flatten()[rows]
        batch.masked_positions = (flat != IGNORE_INDEX).nonzero().squeeze(1)
        batch.labels = flat[batch.masked_positions]
        batch.num_masked = batch.labels.shape[0]
    if sequence_labels is not None:
        batch.sequence_labels = sequence_labels
        batch.num_labelled = int((sequence_labels != IGNORE_INDEX).sum())


def _masked_lm_loss(
    model: Any, hidden_states: Tensor, batch: PackedBatch, targets: Targets, output: TrainingOutput
) -> None:
    assert batch.masked_positions is not None and batch.labels is not None
    loss_sum, correct = model.masked_lm.loss(
        hidden_states, batch.masked_positions, batch.labels, model.word_weight
    )
    output.masked_lm_loss_sum, output.masked_lm_correct = loss_sum.detach(), correct
    _add_loss(output, loss_sum, targets.masked, model.loss_weights[0])


def _sequence_loss(
    logits: Tensor,
    sequence_labels: Tensor,
    targets: Targets,
    output: TrainingOutput,
    weight: float = 1.0,
) -> None:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss_sum = F.cross_entropy(wide, sequence_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    output.sequence_loss_sum = loss_sum.detach()
    output.sequence_correct = (logits.argmax(dim=-1) == sequence_labels).sum()
    _add_loss(output, loss_sum, targets.labelled, weight)


def _add_loss(
    output: TrainingOutput, loss_sum: Tensor, targets: int | Tensor, weight: float
) -> None:
    count = targets if isinstance(targets, Tensor) else max(targets, 1)
    share = loss_sum / count if weight == 1.0 else loss_sum * weight / count
    output.loss = share if output.loss is None else output.loss + share
