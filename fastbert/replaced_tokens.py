"""ELECTRA's discriminator: which tokens of a sequence are not the original ones."""

from __future__ import annotations

from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.heads import DetectionHead
from fastbert.kernels.ops import Rng
from fastbert.losses import detection_loss
from fastbert.model import Model
from fastbert.outputs import Targets, TrainingOutput
from fastbert.packing import PackedBatch


class BertForReplacedTokenDetection(Model):
    """One number a token (Clark et al. 2020); transformers' ElectraForPreTraining."""

    name = "BertForReplacedTokenDetection"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.detection = DetectionHead(config)

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
        """Logits [tokens] or [batch, length], and the loss where there are labels.

        Args:
            input_ids: a PackedBatch (judged tokens in `masked_positions`, in `labels` 1 for a
                replaced and 0 for an original one), or [batch, length] integers.
            attention_mask, token_type_ids, rng: as for BertModel.
            labels: [batch, length] integers, 1, 0, or -100 where there is no target.
            targets: of the whole optimiser step; None for this batch's own.
        """
        call = self.call(input_ids, attention_mask, token_type_ids, rng)
        call.label_rows(labels)
        batch = call.batch
        logits = self.detection(self.encoder(batch, call.rng))
        output = TrainingOutput(logits=call.as_called(logits))
        if batch.labels is not None and batch.masked_positions is not None:
            rows = logits.index_select(0, batch.masked_positions)
            loss_sum, correct = detection_loss(rows, batch.labels)
            output.masked_lm_loss_sum, output.masked_lm_correct = loss_sum.detach(), correct
            output.add_loss(loss_sum, (targets or Targets.of(batch)).masked)
        return output
