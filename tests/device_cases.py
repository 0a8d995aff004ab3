"""Small models of every kind, and batches for them: what is run on devices, real and simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_config, tiny_examples
from torch import nn

from fastbert import models
from fastbert.config import EncoderConfig
from fastbert.models import Model
from fastbert.packing import Capacity, PackedBatch
from fastbert.training.detection import ReplacedTokenPretraining, discriminator_config
from fastbert.training.loss_scale import LossScale
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import TrainingStep

GPU = torch.device("cuda")
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 40},
    "electra": {"embedding_size": 40},
    "modernbert": {"extra": {"local_attention": 6}},
}


def config(**fields: Any) -> EncoderConfig:
    """Heads of a width that kernels take."""
    return tiny_config(**{"hidden_size": 96, **fields})


def of(name: str, **fields: Any) -> Model:
    made: Model = getattr(models, name).from_config(config(**fields))
    return made


def batch_of(seed: int = 0, lengths: tuple[int, ...] = (17, 9, 30), **fields: Any) -> PackedBatch:
    """One capacity, whatever the lengths."""
    examples = tiny_examples(lengths, seed=seed, **fields)
    batch = examples.batch(range(len(lengths)), Capacity(96, 6, 16))
    batch.max_seqlen, batch.sample_ids = 64, torch.arange(6)
    return batch


def of_sequences(seed: int, **fields: Any) -> PackedBatch:
    return dataclasses.replace(batch_of(seed, masked=False), **fields)


def with_spans(seed: int) -> PackedBatch:
    batch = batch_of(seed, masked=False, spans=True)
    return dataclasses.replace(batch, sequence_labels=None)


def trained(
    model: nn.Module, name: str = "adamw", dtype: torch.dtype = torch.bfloat16
) -> TrainingStep:
    """Takes steps on the device."""
    model = model.to(GPU)
    optimizers = Optimizers(model, name, learning_rate=1e-3, muon_learning_rate=1e-3)
    if dtype == torch.float16:
        optimizers.loss_scale = LossScale(GPU)
    return TrainingStep(model, optimizers, dtype, 1.0)


MEAN = {"model_type": "modernbert", "extra": {"classifier_pooling": "mean"}}
# what makes the model, and a batch of a seed
HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], PackedBatch]]] = {
    "pre-training": (lambda: of("BertForPreTraining"), batch_of),
    "tokens": (lambda: of("BertForTokenClassification"), batch_of),
    "pairs": (lambda: of("BertForNextSentencePrediction"), of_sequences),
    "sequences": (lambda: of("BertForSequenceClassification"), of_sequences),
    "mean of tokens": (lambda: of("BertForSequenceClassification", **MEAN), of_sequences),
    "many labels": (
        lambda: of("BertForSequenceClassification"),
        lambda seed: of_sequences(seed, sequence_labels=torch.rand(6, 3)),
    ),
    "numbers": (
        lambda: of("BertForSequenceClassification", labels=["score"]),
        lambda seed: of_sequences(seed, sequence_labels=torch.rand(6)),
    ),
    "spans": (lambda: of("BertForQuestionAnswering"), with_spans),
    "choices": (
        lambda: of("BertForMultipleChoice"),
        lambda seed: of_sequences(seed, num_choices=2, sequence_labels=torch.tensor([0, -100] * 3)),
    ),
    "replaced tokens": (
        lambda: of("BertForReplacedTokenDetection", model_type="electra"),
        batch_of,
    ),
    # the discriminator's batch is drawn
    "generator and discriminator": (
        lambda: ReplacedTokenPretraining(discriminator_config(config(hidden_size=192)), 0.33, 0),
        lambda seed: dataclasses.replace(batch_of(seed), num_labelled=56),
    ),
}
