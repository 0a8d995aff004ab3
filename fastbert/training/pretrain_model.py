"""The model that a pre-training run moves, and what moves it."""

from __future__ import annotations

import dataclasses

import torch

from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.data.objectives import Objective
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining, resolve_model
from fastbert.training.detection import (
    ReplacedTokenPretraining,
    discriminator_config,
    refuse_model,
)
from fastbert.training.methods import layer_rates
from fastbert.training.optimizer import Optimizers
from fastbert.training.pretrain_config import PretrainConfig
from fastbert.training.pretrain_text import Text
from fastbert.training.weight_average import WeightAverage

PretrainingModel = BertForPreTraining | BertForMaskedLM | ReplacedTokenPretraining


def build_model(config: PretrainConfig, text: Text) -> PretrainingModel:
    """Fresh weights, or those of `--model`, with the losses weighted as the objective says."""
    objective = Objective.parse(config.objective)
    refuse_model(objective, config.model)
    model = _build(config, text, objective)
    model.loss_weights = (objective.mlm_weight, objective.pair_weight)
    if isinstance(model, ReplacedTokenPretraining):
        model.recompute(config.recompute)
    else:
        model.encoder.recompute = config.recompute
    return model


def _build(config: PretrainConfig, text: Text, objective: Objective) -> PretrainingModel:
    if objective.detection:
        wide = discriminator_config(config.encoder(text.tokenizer.vocab_size))
        pair = ReplacedTokenPretraining(wide, config.generator_share, config.seed)
        pair.generator.masked_lm.bias.data.copy_(torch.from_numpy(text.log_probabilities))
        return pair
    architecture = BertForPreTraining if objective.pair else BertForMaskedLM
    vocab_size = text.tokenizer.vocab_size
    if config.model is None:
        model = architecture.from_config(config.encoder(vocab_size), config.seed)
        # a decoder that starts at the unigram need not spend its first steps on finding it
        model.masked_lm.bias.data.copy_(torch.from_numpy(text.log_probabilities))
        return model
    folder = resolve_model(config.model)
    saved = EncoderConfig.from_pretrained(folder)
    refuse_foreign_tokenizer(vocab_size, saved, f"--model {config.model}")
    if config.max_seq_len > saved.max_position_embeddings:
        raise InputError(
            f"--max-seq-len must be at most {saved.max_position_embeddings}, the positions of "
            f"--model {config.model}, got {config.max_seq_len}"
        )
    if objective.pair and saved.pair_classes != objective.classes:
        raise InputError(
            f"--objective {config.objective}: --model {config.model} tells {saved.pair_classes} "
            f"orders apart, not {objective.classes}"
        )
    changed = dataclasses.replace(
        saved,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )
    return architecture.from_pretrained(folder, config=changed, new_heads=True, seed=config.seed)


def build_optimizers(model: PretrainingModel, config: PretrainConfig) -> Optimizers:
    """As the settings say."""
    optimizers = Optimizers(
        model,
        config.optimizer,
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        rate_factor=layer_rates(model.config.num_hidden_layers, config.layer_decay),
    )
    if config.ema:
        optimizers.average = WeightAverage(model, config.ema)
    return optimizers
