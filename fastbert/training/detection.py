"""Pre-training by replaced-token detection (Clark et al. 2020, ELECTRA, arXiv:2003.10555).

1. A small generator predicts the masked tokens.
2. One token is drawn from each of its predictions and put in the masked one's place.
3. The discriminator says of every token whether it is the original; a token that was drawn right
   is one.

Both losses are summed, the discriminator's with a weight of 50 (section 3.1). No gradient flows
through the draw. The embeddings are shared (section 3.2): they are as wide as the discriminator,
and the generator projects them down.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.data.objectives import Objective
from fastbert.errors import InputError
from fastbert.heads import HEAD_LAYER
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.losses import detection_loss
from fastbert.models import (
    BertForMaskedLM,
    BertForReplacedTokenDetection,
    Targets,
    TrainingOutput,
)
from fastbert.packing import IGNORE_INDEX, PackedBatch

GENERATOR_FOLDER = "generator"
HEAD_DIM = 64
# dropout sites of heads are below
_DRAW_SITE = 8
# held-out text is corrupted alike in every evaluation
_HELDOUT_SEED = 20_200_323
# logits of so many rows at once
_ROWS_AT_ONCE = 512


class ReplacedTokenPretraining(nn.Module):
    """Generator and discriminator, trained together.

    Args:
        config: of the discriminator, of family electra.
        generator_share: hidden size of the generator over the discriminator's, rounded to heads
            of 64.
        seed: of fresh weights.

    Attributes:
        loss_weights: of the generator's and of the discriminator's loss.
    """

    def __init__(self, config: EncoderConfig, generator_share: float, seed: int) -> None:
        super().__init__()
        self.config = config
        self.discriminator = BertForReplacedTokenDetection.from_config(config, seed)
        self.generator = BertForMaskedLM.from_config(
            generator_config(config, generator_share), seed + 1
        )
        _share_embeddings(self.generator, self.discriminator)
        self.loss_weights = (1.0, 50.0)

    @property
    def encoder(self) -> nn.Module:
        """The discriminator's, which is what is wanted in the end."""
        return self.discriminator.encoder

    @property
    def masked_lm(self) -> nn.Module:
        """The generator's head."""
        return self.generator.masked_lm

    def recompute(self, whether: bool) -> None:
        """Compute layers again in the backward pass, or keep what they need."""
        for model in (self.generator, self.discriminator):
            model.encoder.recompute = whether

    def forward(
        self, batch: PackedBatch, *, rng: Rng | None = None, targets: Targets | None = None
    ) -> TrainingOutput:
        """Both losses.

        Args:
            batch: masked, with `labels`; `num_labelled` is its number of real tokens.
            rng: names the dropout draws and those from the generator; None for no dropout, and
                the same draws every time.
            targets: of the whole optimiser step; None for this batch's own.

        Returns:
            The generator's figures as those of the masked-LM objective, the discriminator's as
            those of the sequence objective, whose targets are the real tokens.
        """
        targets = targets or Targets.of(batch)
        generator, head = self.generator, self.generator.masked_lm
        hidden_states, selected = generator.encoder.selected(batch, rng, masked=True)
        assert selected.masked_positions is not None and selected.labels is not None
        output = TrainingOutput()
        loss_sum, correct = head.loss(
            hidden_states, selected.masked_positions, selected.labels, generator.word_weight
        )
        output.masked_lm_loss_sum, output.masked_lm_correct = loss_sum.detach(), correct
        output.add_loss(loss_sum, targets.masked, self.loss_weights[0])
        with torch.no_grad():
            rows = hidden_states.index_select(0, selected.masked_positions)
            corrupted, replaced = self.corrupt(batch, rows, rng)
        logits = self.discriminator.detection(self.discriminator.encoder(corrupted, rng))
        loss_sum, output.sequence_correct = detection_loss(logits, replaced)
        output.sequence_loss_sum = loss_sum.detach()
        output.add_loss(loss_sum, targets.labelled, self.loss_weights[1])
        return output

    def corrupt(
        self, batch: PackedBatch, rows: Tensor, rng: Rng | None
    ) -> tuple[PackedBatch, Tensor]:
        """The batch with a token drawn for each masked one.

        Args:
            batch: masked.
            rows: [masked, hidden_size] of the generator's last layer.
            rng: names the draws.

        Returns:
            The batch, and [tokens] int64 labels: 1 replaced, 0 original, -100 no token.
        """
        positions, labels = batch.masked_positions, batch.labels
        assert positions is not None and labels is not None
        uniforms = _uniforms(batch, rng)
        drawn = torch.cat(
            [
                draw_tokens(self.generator.masked_lm(part, self.generator.word_weight), uniform)
                for part, uniform in zip(
                    rows.split(_ROWS_AT_ONCE), uniforms.split(_ROWS_AT_ONCE), strict=True
                )
            ]
        )
        used = labels != IGNORE_INDEX
        # an unused slot points to a token that no mask is on, which it leaves alone
        own = batch.input_ids.index_select(0, positions)
        input_ids = batch.input_ids.index_copy(0, positions, torch.where(used, drawn, own))
        replaced = torch.zeros_like(batch.input_ids)
        replaced.index_copy_(0, positions, (used & (drawn != labels)).to(replaced.dtype))
        place = torch.arange(batch.capacity, device=replaced.device)
        replaced.masked_fill_(place >= batch.cu_seqlens[-1], IGNORE_INDEX)
        corrupted = dataclasses.replace(batch, input_ids=input_ids)
        # sequences lie as before: what was worked out of them on the host stays
        corrupted.__dict__["layout"] = batch.layout
        return corrupted, replaced

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the discriminator as transformers' ElectraForPreTraining, and beside it in
        `generator/` the generator as ElectraForMaskedLM."""
        self.discriminator.save_pretrained(folder)
        whole = BertForMaskedLM(self.generator.config)
        shared = self.discriminator.encoder.embeddings.state_dict(prefix="encoder.embeddings.")
        whole.load_state_dict({**self.generator.state_dict(), **shared})
        whole.save_pretrained(Path(folder) / GENERATOR_FOLDER)


def generator_config(config: EncoderConfig, share: float) -> EncoderConfig:
    """A narrower encoder of as many layers over the same embeddings.

    Raises:
        InputError: a share that leaves no generator, or one wider than the discriminator.
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"--generator-share must be in (0, 1], got {share}")
    heads = max(round(share * config.hidden_size / HEAD_DIM), 1)
    return replace(
        config,
        hidden_size=HEAD_DIM * heads,
        num_attention_heads=heads,
        intermediate_size=4 * HEAD_DIM * heads,
        embedding_size=config.embedding_width,
    )


def discriminator_config(config: EncoderConfig) -> EncoderConfig:
    """The same encoder in family electra, its embeddings as wide as its layers."""
    return replace(config, model_type="electra", embedding_size=config.hidden_size)


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token a row, by the softmax of its logits: where the running sum passes `uniform`.

    Args:
        logits: [rows, vocab_size].
        uniform: [rows] float64 in (0, 1).

    Returns:
        [rows] int64.
    """
    # in 64 bits: the running sum of a large vocabulary would lose its rare words
    total = logits.double().softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(total, (uniform * total[:, -1])[:, None]).squeeze(1)
    return found.clamp(max=logits.shape[1] - 1)


def refuse_model(objective: Objective, model: str | None) -> None:
    """Raise InputError where a run by this objective cannot go on from a model."""
    if objective.detection and model is not None:
        raise InputError(f"--objective {objective}: begins with fresh weights, without --model")


def _uniforms(batch: PackedBatch, rng: Rng | None) -> Tensor:
    """[masked] float64 in (0, 1), functions of seed, step, sample and place."""
    assert batch.masked_positions is not None
    rng = (rng or Rng(_HELDOUT_SEED)).at(HEAD_LAYER, _DRAW_SITE)
    device = batch.input_ids.device
    if device.type != "cpu":
        rng = rng.on(device)
    if batch.sample_ids is not None:
        of_stream = batch.layout.rows()
        rng = rng.rows(of_stream.sample_ids, of_stream.positions)
    rng = rng.select(batch.masked_positions)
    return ops.uniforms(rng, len(batch.masked_positions), device)


def _share_embeddings(
    generator: BertForMaskedLM, discriminator: BertForReplacedTokenDetection
) -> None:
    """One module for both, which is the discriminator's child alone: so its parameters are in the
    whole model's state once."""
    shared = discriminator.encoder.embeddings
    del generator.encoder._modules["embeddings"]
    generator.encoder.__dict__["embeddings"] = shared
