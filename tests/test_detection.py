"""Replaced-token detection: what is drawn, what is judged, and what a run leaves."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import stirred, tiny_config, tiny_corpus, tiny_examples, tiny_tokenizer

from fastbert.data.loader import one_pass
from fastbert.data.objectives import DETECTION_WEIGHT, Objective
from fastbert.data.regions import Part
from fastbert.data.stream import StreamConfig
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng, uniforms
from fastbert.models import BertForMaskedLM, BertForReplacedTokenDetection
from fastbert.packing import Capacity
from fastbert.training.detection import (
    GENERATOR_FOLDER,
    ReplacedTokenPretraining,
    discriminator_config,
    draw_tokens,
    generator_config,
)
from fastbert.training.optimizer import Optimizers
from fastbert.training.pretrain import PretrainConfig, pretrain

LENGTHS = [17, 9, 30]


def model_of(seed: int = 0, **fields) -> ReplacedTokenPretraining:
    config = discriminator_config(
        tiny_config(hidden_size=128, num_attention_heads=2, intermediate_size=64, **fields)
    )
    return stirred(ReplacedTokenPretraining(config, 0.5, seed), seed)


def batch_of(seed: int = 0, lengths=LENGTHS, capacity: Capacity | None = None):
    examples = tiny_examples(lengths, seed=seed)
    batch = examples.batch(range(len(lengths)), capacity)
    batch.num_labelled = batch.num_tokens
    return batch


def test_uniforms_are_uniform_and_functions_of_their_coordinates():
    count = 20_000
    ids = torch.arange(count, dtype=torch.int32) % 50
    places = torch.arange(count, dtype=torch.int32) // 50
    drawn = uniforms(Rng(3, 5).at(9, 9).rows(ids, places), count)
    assert drawn.dtype == torch.float64 and drawn.min() > 0.0 and drawn.max() < 1.0
    # Kolmogorov's distance, beyond which one in a thousand of uniform samples lies
    ranked = drawn.sort().values
    steps = torch.arange(1, count + 1) / count
    distance = max(float((steps - ranked).max()), float((ranked - steps + 1 / count).max()))
    assert distance < 1.95 / math.sqrt(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    again = uniforms(Rng(3, 5).at(9, 9).rows(ids[order], places[order]), count)
    assert torch.equal(again, drawn[order])
    for other in (Rng(4, 5).at(9, 9), Rng(3, 6).at(9, 9), Rng(3, 5).at(9, 8), Rng(3, 5).at(8, 9)):
        assert not torch.equal(uniforms(other.rows(ids, places), count), drawn)
    state = Rng(3, 5).on("cpu").at(9, 9).rows(ids, places)
    assert torch.equal(uniforms(state, count), drawn)
    with pytest.raises(ValueError, match=r"uniforms: rng.sequence_ids must be \[7\]"):
        uniforms(Rng(3).rows(ids, places), 7)


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    count, logits = 40_000, torch.tensor([0.0, 2.0, -3.0, 1.0, -math.inf, 0.5])
    uniform = uniforms(Rng(1, 2), count)
    drawn = draw_tokens(logits.expand(count, -1), uniform)
    shares = logits.double().softmax(0)
    counts = torch.bincount(drawn, minlength=6)
    for found, share in zip(counts.tolist(), shares.tolist(), strict=True):
        # four and a half standard deviations of the binomial
        assert abs(found - count * share) <= 4.5 * math.sqrt(count * share * (1 - share)) + 1e-9
    assert counts[4] == 0
    # the ends of the unit interval are tokens too
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(logits.expand(2, -1), edges).tolist() == [0, 5]


def test_masked_places_are_drawn_and_nothing_else_changes():
    model = model_of()
    batch = batch_of(capacity=Capacity(64, 5, 20))
    rows = torch.randn(20, model.generator.config.hidden_size)
    corrupted, replaced = model.corrupt(batch, rows, Rng(1, 2))
    used = batch.labels >= 0
    masked = batch.masked_positions[used]
    elsewhere = torch.ones(64, dtype=torch.bool).index_fill(0, masked, False)
    assert torch.equal(corrupted.input_ids[elsewhere], batch.input_ids[elsewhere])
    assert (replaced[elsewhere][: 56 - len(masked)] == 0).all()
    assert (replaced[56:] == -100).all() and (replaced[:56] >= 0).all()
    # a token that was drawn right is an original
    right = corrupted.input_ids[masked] == batch.labels[used]
    assert torch.equal(replaced[masked] == 0, right)
    again, _ = model.corrupt(batch, rows, Rng(1, 2))
    assert torch.equal(again.input_ids, corrupted.input_ids)
    other, _ = model.corrupt(batch, rows, Rng(1, 3))
    assert not torch.equal(other.input_ids, corrupted.input_ids)


def test_draws_follow_the_sample_however_it_is_packed():
    model = model_of()
    examples = tiny_examples(LENGTHS)
    examples.sample_ids = np.array([7, 3, 9])
    width = model.generator.config.hidden_size

    def drawn(chosen):
        batch = examples.batch(chosen)
        # the same prediction at every masked place
        rows = torch.linspace(-1, 1, width).expand(len(batch.masked_positions), -1)
        corrupted, _ = model.corrupt(batch, rows, Rng(1, 2))
        starts = batch.cu_seqlens.tolist()
        return {
            index: corrupted.input_ids[starts[place] : starts[place + 1]].tolist()
            for place, index in enumerate(chosen)
        }

    assert drawn([0, 1, 2]) == drawn([2, 0, 1]) == drawn([0]) | drawn([2, 1])


def test_the_losses_are_those_of_both_models_with_their_weights():
    rule = ErrorRule()
    for seed in SEEDS:
        model, batch = model_of(seed), batch_of(seed)
        exact = model_of(seed).double()
        # without dropout; the draws are those of held-out text
        output = model(batch)
        theirs = BertForMaskedLM.forward(exact.generator, batch)
        # what was drawn is drawn from fp32: taken from our own generator
        own = model.generator.encoder(batch).index_select(0, batch.masked_positions)
        corrupted, replaced = model.corrupt(batch, own, None)
        judged = dataclasses.replace(
            corrupted, masked_positions=torch.arange(batch.num_tokens), labels=replaced
        )
        found = exact.discriminator(judged)
        expected = theirs.masked_lm_loss_sum / batch.num_masked
        expected = expected + 50.0 * found.masked_lm_loss_sum / batch.num_tokens
        plain = BertForMaskedLM.forward(model.generator, batch).masked_lm_loss_sum
        plain = plain / batch.num_masked + 50.0 * (
            model.discriminator(judged).masked_lm_loss_sum / batch.num_tokens
        )
        assert output.sequence_correct == found.masked_lm_correct
        rule.compare("loss", output.loss.detach(), plain.detach(), expected.detach())
    rule.assert_within()


def test_no_gradient_flows_through_the_draw_and_embeddings_are_shared():
    model, batch = model_of(), batch_of()
    names = [name for name, _ in model.named_parameters()]
    assert sum("word_embeddings" in name for name in names) == 1
    assert list(model.state_dict()) == [*dict(model.named_parameters())]
    model.loss_weights = (0.0, 50.0)
    model(batch, rng=Rng(1)).loss.backward()
    for name, parameter in model.generator.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    words = model.discriminator.encoder.embeddings.word_embeddings.weight
    assert words.grad.any()
    assert model.generator.word_weight is words
    covered = Optimizers(model, "muon", learning_rate=1e-3, muon_learning_rate=1e-3)
    assert {*covered.names.values()} == {*names}


def test_generators():
    config = discriminator_config(tiny_config(hidden_size=768, num_attention_heads=12))
    found = generator_config(config, 1 / 3)
    assert (found.hidden_size, found.num_attention_heads, found.intermediate_size) == (256, 4, 1024)
    assert found.embedding_width == config.embedding_width == 768
    assert found.num_hidden_layers == config.num_hidden_layers
    assert generator_config(config, 0.01).hidden_size == 64
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match=r"--generator-share must be in \(0, 1\]"):
            generator_config(config, share)


def test_objectives():
    found = Objective.parse("rtd")
    assert found.detection and found.pair is None
    assert (found.mlm_weight, found.pair_weight) == (1.0, DETECTION_WEIGHT) == (1.0, 50.0)
    assert str(found) == "rtd" and found.added_tokens == 2
    lighter = Objective.parse("25*rtd")
    assert lighter.pair_weight == 25.0 and Objective.parse(str(lighter)) == lighter
    for text in ("mlm+rtd", "rtd+sop", "0*rtd", "rtd+rtd"):
        with pytest.raises(InputError, match="--objective must be mlm"):
            Objective.parse(text)


def test_not_in_shards():
    with pytest.raises(InputError, match="--objective rtd: not with --parallel fsdp"):
        PretrainConfig(out="run", max_steps=1, objective="rtd", parallel="fsdp")


def test_every_token_is_judged():
    config = StreamConfig(Objective.parse("rtd"), token_budget=256, max_seq_len=40)
    for batch in one_pass([Part.whole(tiny_corpus())], tiny_tokenizer(), config):
        assert batch.num_labelled == batch.num_tokens and batch.sequence_labels is None


TEXT = "\n\n".join(
    f"The ship number {n} left the harbour.\nIt carried {n} barrels of oil.\nNobody saw it again."
    for n in range(60)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rtd")
    (folder / "ships.txt").write_text(TEXT, encoding="utf-8")
    tiny_tokenizer().save_pretrained(folder / "tok")
    for name, steps in (("run", 30), ("again", 30)):
        config = PretrainConfig(
            out=str(folder / name),
            size="tiny",
            objective="rtd",
            max_steps=steps,
            token_budget=256,
            max_seq_len=32,
            dtype="fp32",
            learning_rate=5e-3,
        )
        sources = [str(folder / "ships.txt")]
        pretrain(sources, str(folder / "tok"), config, say=lambda line: None)
    return folder / "run"


def test_a_run_leaves_a_discriminator_and_its_generator(run):
    report = json.loads((run / "report.json").read_text())
    again = json.loads((run.parent / "again" / "report.json").read_text())
    assert report["mlm_loss_heldout"] == again["mlm_loss_heldout"]
    assert report["replaced_loss_heldout"] == again["replaced_loss_heldout"]
    assert 0.0 < report["replaced_loss_heldout"] < math.log(2)
    assert report["mlm_loss_heldout"] < report["unigram_loss_heldout"]
    discriminator = BertForReplacedTokenDetection.from_pretrained(run / "model")
    generator = BertForMaskedLM.from_pretrained(run / "model" / GENERATOR_FOLDER)
    assert discriminator.config.model_type == generator.config.model_type == "electra"
    ours, theirs = (m.encoder.embeddings.word_embeddings.weight for m in (discriminator, generator))
    assert torch.equal(ours, theirs)


def test_transformers_finds_the_same_logits(run):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    rule = ErrorRule()
    mask = torch.arange(20) < torch.tensor([[20], [7], [13]])
    for folder, architecture, ours in (
        (run / "model", "ElectraForPreTraining", BertForReplacedTokenDetection),
        (run / "model" / GENERATOR_FOLDER, "ElectraForMaskedLM", BertForMaskedLM),
    ):
        found, info = getattr(transformers, architecture).from_pretrained(
            folder, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        model, theirs = ours.from_pretrained(folder), found.eval()
        exact = copy.deepcopy(theirs).double()
        for seed in SEEDS:
            ids = torch.randint(5, 40, (3, 20), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                logits = [
                    one(ids, attention_mask=mask.long()).logits[mask]
                    for one in (model, theirs, exact)
                ]
            rule.compare(architecture, *logits)
    rule.assert_within()
