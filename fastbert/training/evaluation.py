"""Held-out scores of a pre-trained model, beside what needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastbert.data.tokenized import TokenizedCorpus
from fastbert.models import BertForPreTraining
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.training.loop import autocast


def unigram_log_probabilities(corpus: TokenizedCorpus, vocab_size: int) -> np.ndarray:
    """[vocab_size] float64: how often each id occurs, one added to every count."""
    counts = corpus.unigram_counts(vocab_size).astype(np.float64) + 1.0
    return np.log(counts / counts.sum())


def evaluate_pretraining(
    model: BertForPreTraining, batches: Sequence[PackedBatch], dtype: torch.dtype
) -> dict[str, float]:
    """Score the masked-LM and the pair objective.

    Args:
        model: with both heads.
        batches: masked and labelled, on the host.
        dtype: of matrix products.

    Returns:
        mlm_loss (nats a target), masked_accuracy, and pair_accuracy where there are pairs.
    """
    device = next(model.parameters()).device
    loss = correct = pairs_correct = 0.0
    with torch.no_grad(), autocast(device, dtype):
        for batch in batches:
            output = model(batch.to(device))
            loss += float(output.masked_lm_loss_sum)
            correct += float(output.masked_lm_correct)
            if output.sequence_correct is not None:
                pairs_correct += float(output.sequence_correct)
    masked = sum(batch.num_masked for batch in batches)
    pairs = sum(batch.num_labelled for batch in batches)
    figures = {"mlm_loss": loss / masked, "masked_accuracy": correct / masked}
    if pairs:
        figures["pair_accuracy"] = pairs_correct / pairs
    return figures


def unigram_loss(batches: Sequence[PackedBatch], log_probabilities: np.ndarray) -> float:
    """Nats a target, at the same masked positions, of always predicting the unigram."""
    labels = np.concatenate([b.labels.numpy() for b in batches if b.labels is not None])
    return float(-log_probabilities[labels[labels != IGNORE_INDEX]].mean())
