"""Encoders with and without heads: packed and padded calls, Hugging Face's files in and out.

One class a task; the family is the configuration's, so that `BertForTokenClassification` also reads
a RoBERTa. Every model takes a PackedBatch, or `input_ids` and `attention_mask` [batch, length].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.heads import MaskedLMHead, Projection, dropped
from fastbert.kernels.ops import Rng
from fastbert.losses import class_loss, span_loss
from fastbert.model import Model, resolve_model
from fastbert.outputs import BertOutput, Output, Targets, TrainingOutput
from fastbert.packing import PackedBatch
from fastbert.replaced_tokens import BertForReplacedTokenDetection

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForReplacedTokenDetection",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "BertOutput",
    "Model",
    "Output",
    "Targets",
    "TrainingOutput",
    "resolve_model",
]


class BertModel(Model):
    """The encoder, with its pooler where the family has one."""

    name = "BertModel"

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
            rng: names this step's dropout draws; None for no dropout in a packed call, and for
                torch's default generator in a padded call in training mode.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        hidden_states = self.encoder(call.batch, call.rng)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooled(hidden_states, call.batch, call.rng)
        return BertOutput(call.as_called(hidden_states), pooled)


class BertForPreTraining(Model):
    """Masked-LM head and a two-way head on the pooled first token (NSP, or sentence order)."""

    name = "BertForPreTraining"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.masked_lm = MaskedLMHead(config, self.head.activation)
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
            input_ids, attention_mask, token_type_ids, rng: as for BertModel.
            labels: [batch, length], -100 where there is no target.
            next_sentence_label: [batch].
            targets: of the whole optimiser step; None for this batch's own.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_rows(labels)
        call.label_sequences(next_sentence_label)
        batch = call.batch
        scored = batch.labels is not None or batch.sequence_labels is not None
        hidden_states, batch = self.encoder.selected(
            batch, call.rng, masked=batch.labels is not None, first=scored
        )
        pooled = self.pooled(hidden_states, batch, call.rng)
        pooled = dropped(pooled, self.config.dropout(self.head.dropout), call.rng)
        relationship = F.linear(pooled, self.next_sentence.weight, self.next_sentence.bias)
        output = TrainingOutput(seq_relationship_logits=relationship)
        targets = targets or Targets.of(batch)
        if batch.labels is None and batch.sequence_labels is None:
            output.logits = call.as_called(self.masked_lm(hidden_states, self.word_weight))
        if batch.labels is not None:
            _masked_lm_loss(self, self.masked_lm, hidden_states, batch, targets, output)
        if batch.sequence_labels is not None:
            labels, weight = batch.sequence_labels, self.loss_weights[1]
            _sequence_loss(relationship, labels, targets, output, weight)
        return output


class BertForMaskedLM(Model):
    """The masked-LM head alone."""

    name = "BertForMaskedLM"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.masked_lm = MaskedLMHead(config, self.head.activation)

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
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_rows(labels)
        masked = call.batch.labels is not None
        hidden_states, batch = self.encoder.selected(call.batch, call.rng, masked=masked)
        output = TrainingOutput()
        if batch.labels is not None:
            targets = targets or Targets.of(batch)
            _masked_lm_loss(self, self.masked_lm, hidden_states, batch, targets, output)
            return output
        output.logits = call.as_called(self.masked_lm(hidden_states, self.word_weight))
        return output


class BertForNextSentencePrediction(Model):
    """The two-way head on the pooled first token alone."""

    name = "BertForNextSentencePrediction"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)

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
        """Logits [sequences, 2], and the loss where there are labels [batch]: 1 is a random pair.

        A PackedBatch has the labels in its `sequence_labels`.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_sequences(labels)
        pooled = self.pooled_sequences(call)
        logits = F.linear(pooled, self.next_sentence.weight, self.next_sentence.bias)
        return _with_sequence_loss(logits, call.batch, targets)


class BertForSequenceClassification(Model):
    """One class a sequence, or numbers; `config.labels` names the outputs."""

    name = "BertForSequenceClassification"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.classifier = Projection(config, config.num_labels, config.dropout(self.head.dropout))

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
            attention_mask, token_type_ids, rng: as for BertModel.
            labels: [batch] classes; or floating, [batch] for squared error of the one output, or
                [batch, labels] for binary cross-entropy of each.
            targets: of the whole optimiser step; None for this batch's own.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_sequences(labels)
        logits = self.classifier(self.pooled_sequences(call), call.rng)
        return _with_sequence_loss(logits, call.batch, targets)


class BertForTokenClassification(Model):
    """One class a token; `config.labels` names the classes."""

    name = "BertForTokenClassification"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.classifier = Projection(config, config.num_labels, config.dropout(self.head.dropout))

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
        """Logits [tokens, labels] or [batch, length, labels], and the loss where there are labels.

        Args:
            input_ids: a PackedBatch (labelled tokens in `masked_positions`, their classes in
                `labels`), or [batch, length] integers.
            attention_mask, token_type_ids, rng: as for BertModel.
            labels: [batch, length], -100 where there is no target.
            targets: of the whole optimiser step; None for this batch's own.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_rows(labels)
        batch = call.batch
        logits = self.classifier(self.token_states(call), call.rng)
        output = TrainingOutput(logits=call.as_called(logits))
        if batch.labels is not None and batch.masked_positions is not None:
            rows = logits.index_select(0, batch.masked_positions)
            # a row nobody asked for may hold anything
            rows = rows.masked_fill((batch.labels < 0)[:, None], 0.0)
            loss_sum, correct = class_loss(rows, batch.labels)
            output.masked_lm_loss_sum, output.masked_lm_correct = loss_sum.detach(), correct
            output.add_loss(loss_sum, (targets or Targets.of(batch)).masked)
        return output


class BertForQuestionAnswering(Model):
    """Where in the sequence an answer starts and ends."""

    name = "BertForQuestionAnswering"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.span = Projection(config, 2, config.dropout(self.head.dropout))

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        rng: Rng | None = None,
        targets: Targets | None = None,
    ) -> TrainingOutput:
        """`start_logits` and `end_logits`, and the loss where there are answers.

        transformers' own loss lets padding compete for the answer; here it does not, and its
        logits are the lowest number there is.

        Args:
            input_ids: a PackedBatch (answers in its `span_labels`), or [batch, length] integers.
            attention_mask, token_type_ids, rng: as for BertModel.
            start_positions, end_positions: [batch], columns of the answer's first and last token;
                what is outside the sequence, e.g. -100, is no target.
            targets: of the whole optimiser step; None for this batch's own.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_spans(start_positions, end_positions)
        logits = self.span(self.token_states(call), call.rng)
        output = TrainingOutput()
        at_padding = torch.finfo(logits.dtype).min
        output.start_logits, output.end_logits = call.as_called(logits, at_padding).unbind(-1)
        if call.batch.span_labels is not None:
            loss_sum, output.sequence_correct = span_loss(logits, call.batch)
            output.sequence_loss_sum = loss_sum.detach()
            output.add_loss(loss_sum, (targets or Targets.of(call.batch)).labelled)
        return output


class BertForMultipleChoice(Model):
    """One number a choice; the choices of a question compete."""

    name = "BertForMultipleChoice"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.classifier = Projection(config, 1, config.dropout(self.head.dropout))

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
        """Logits [questions, choices], and the loss where there are labels.

        Args:
            input_ids: a PackedBatch with `num_choices` neighbouring sequences a question (in its
                `sequence_labels`, at the first of them, the right one's number), or
                [batch, choices, length] integers.
            attention_mask, token_type_ids: [batch, choices, length], with padded ids only.
            labels: [batch], the number of the right choice.
            rng: as for BertModel.
            targets: of the whole optimiser step; None for this batch's own.

        Raises:
            ValueError: padded ids of another shape, or sequences that do not divide by the choices.
        """
        if isinstance(input_ids, PackedBatch):
            num_choices = input_ids.num_choices
        else:
            if input_ids.dim() != 3:
                raise ValueError(
                    f"input_ids must be [batch, choices, length], got {list(input_ids.shape)}"
                )
            num_choices = input_ids.shape[1]
            input_ids = input_ids.flatten(0, 1)
            attention_mask, token_type_ids = (
                None if tensor is None else tensor.flatten(0, 1)
                for tensor in (attention_mask, token_type_ids)
            )
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        batch, slots = call.batch, len(call.batch.cu_seqlens) - 1
        if slots % num_choices:
            raise ValueError(f"{slots} sequences are no multiple of {num_choices} choices")
        scores = self.classifier(self.pooled_sequences(call), call.rng)
        call.label_sequences(labels)
        if call.rows is None and batch.sequence_labels is not None:
            labels = batch.sequence_labels.view(-1, num_choices)[:, 0]
        logits = scores.view(-1, num_choices)
        output = TrainingOutput(logits=logits)
        if labels is not None:
            _sequence_loss(logits, labels, targets or Targets.of(batch), output)
        return output


def _masked_lm_loss(
    model: Model,
    head: MaskedLMHead,
    hidden_states: Tensor,
    batch: PackedBatch,
    targets: Targets,
    output: TrainingOutput,
) -> None:
    assert batch.masked_positions is not None and batch.labels is not None
    loss_sum, correct = head.loss(
        hidden_states, batch.masked_positions, batch.labels, model.word_weight
    )
    output.masked_lm_loss_sum, output.masked_lm_correct = loss_sum.detach(), correct
    output.add_loss(loss_sum, targets.masked, model.loss_weights[0])


def _with_sequence_loss(
    logits: Tensor, batch: PackedBatch, targets: Targets | None
) -> TrainingOutput:
    output = TrainingOutput(logits=logits)
    if batch.sequence_labels is not None:
        _sequence_loss(logits, batch.sequence_labels, targets or Targets.of(batch), output)
    return output


def _sequence_loss(
    logits: Tensor, labels: Tensor, targets: Targets, output: TrainingOutput, weight: float = 1.0
) -> None:
    loss_sum, output.sequence_correct = class_loss(logits, labels)
    output.sequence_loss_sum = loss_sum.detach()
    output.add_loss(loss_sum, targets.labelled, weight)
