from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune import config, pretrained, texts  # noqa: F401
from tiny import stirred, task_gradients, tiny_config, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import BertForSequenceClassification
from fastbert.tasks.classify import Classify
from fastbert.tasks.embed import in_batch_loss
from fastbert.tasks.losses import Shaping, binary_loss, choice_loss, class_loss
from fastbert.tasks.registry import make_task
from fastbert.tasks.saved import Saved
from fastbert.training import finetune as finetune_module
from fastbert.training import finetune_run
from fastbert.training.finetune import finetune, refuse_unfit
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.finetune_run import Run
from fastbert.training.meter import NoMeter
from fastbert.training.methods import (
    class_weights,
    count_layers,
    freeze_layers,
    layer_rates,
)
from fastbert.training.optimizer import Optimizers
from fastbert.training.seeds import finetune_seeds, spread


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)


def tiny_model(seed: int = 0) -> BertForSequenceClassification:
    shape = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=["land", "sea"])
    return stirred(BertForSequenceClassification.from_config(shape, seed), seed)


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("none", []),
        ("embeddings", ["encoder.embeddings."]),
        ("1", ["encoder.embeddings.", "encoder.layers.0."]),
        ("2", ["encoder."]),
        ("encoder", ["encoder."]),
    ],
)
def test_what_is_frozen_is_not_trained(freeze, frozen) -> None:
    model = tiny_model()
    trained = freeze_layers(model, freeze)
    kept = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert kept == {n for n, _ in model.named_parameters() if n.startswith(tuple(frozen or ["-"]))}
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_freezing_what_is_not_there(config) -> None:  # noqa: F811
    with pytest.raises(InputError, match="--freeze 3: the model has 2 layers"):
        refuse_unfit(Classify(), tiny_model(), dataclasses.replace(config, freeze="3"))
    for bad in ("0", "-1", "all", "1.5"):
        with pytest.raises(InputError, match="--freeze must be none, embeddings, a number"):
            freeze_layers(tiny_model(), bad)


@pytest.mark.parametrize(
    ("task", "options", "fields", "message"),
    [
        ("similarity", {}, {"label_smoothing": 0.1}, "--label-smoothing 0.1: the loss of similar"),
        ("tag", {"crf": True}, {"label_smoothing": 0.1}, "--label-smoothing 0.1: the loss of tag"),
        ("tag", {"crf": True}, {"class_weights": "balanced"}, "--class-weights balanced: the loss"),
        ("answer", {}, {"class_weights": "balanced"}, "--class-weights balanced: the loss of answ"),
        ("embed", {}, {"freeze": "encoder"}, "--freeze encoder: embed here has no head; nothing"),
        ("embed", {}, {"freeze": "2"}, "--freeze 2: embed here has no head"),
        ("similarity", {"manner": "cosine"}, {"freeze": "encoder"}, "similarity here has no head"),
    ],
)
def test_a_method_that_would_do_nothing(config, task, options, fields, message) -> None:  # noqa: F811
    with pytest.raises(InputError, match=message):
        refuse_unfit(
            make_task(task, **options), tiny_model(), dataclasses.replace(config, **fields)
        )


def test_what_does_something_is_taken(config) -> None:  # noqa: F811
    refuse_unfit(make_task("embed"), tiny_model(), dataclasses.replace(config, freeze="1"))
    for task in ("classify", "tag", "relation", "intent"):
        shaped = dataclasses.replace(config, class_weights="balanced", label_smoothing=0.1)
        refuse_unfit(make_task(task), tiny_model(), dataclasses.replace(shaped, freeze="encoder"))


def test_nothing_is_left_behind_by_a_method_that_does_not_fit(config) -> None:  # noqa: F811
    deep = dataclasses.replace(config, freeze="3")
    with pytest.raises(InputError, match="--freeze 3: the model has 2 layers"):
        finetune(Classify(), deep, say=lambda _: None)
    assert not Path(config.out).exists()


def test_layers_that_share_weights_are_one() -> None:
    shared = tiny_config(
        model_type="albert", num_hidden_layers=6, num_hidden_groups=1, inner_group_num=1
    )
    assert count_layers(BertForSequenceClassification.from_config(shared)) == 1
    assert count_layers(tiny_model()) == 2


def test_rates_fall_from_the_last_layer_to_the_embeddings() -> None:
    factor = layer_rates(2, 0.5)
    rates = {name: factor(name) for name, _ in tiny_model().named_parameters()}
    assert {rate for name, rate in rates.items() if "layers.1." in name} == {1.0}
    assert {rate for name, rate in rates.items() if "layers.0." in name} == {0.5}
    assert {rate for name, rate in rates.items() if ".embeddings." in name} == {0.25}
    assert rates["classifier.dense.weight"] == rates["pooler.dense.bias"] == 1.0
    assert factor("body.encoder.layers.0.qkv.weight") == 0.5
    assert layer_rates(2, 1.0) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_gets_its_rate(optimizer) -> None:
    model = tiny_model()
    optimizers = Optimizers(
        model,
        optimizer,
        learning_rate=1e-3,
        muon_learning_rate=1e-3,
        rate_factor=layer_rates(2, 0.5),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    for part in optimizers.optimizers:
        for group in part.param_groups:
            for parameter in group["params"]:
                expected = 0.5 * 1e-3 * layer_rates(2, 0.5)(names[id(parameter)])
                assert group["lr"] == expected


def test_rare_classes_count_more_and_the_mean_stays_one() -> None:
    counts = np.array([6, 2, 0])
    weights = class_weights("balanced", counts)
    assert weights.tolist() == pytest.approx([8 / 12, 2.0, 0.0])
    assert float(weights.numpy() @ counts) == pytest.approx(counts.sum())
    assert class_weights("none", counts) is None


def test_class_weights_are_sent_to_the_model_once(tmp_path) -> None:
    rows = texts(6, 0)
    task = fitted(rows)
    units = task.build(rows, tiny_tokenizer())
    settings = {"class_weights": "balanced", "batch_size": 2, "dtype": "fp32"}
    wanted = FinetuneConfig("model", "train", "eval", str(tmp_path), **settings)
    model = tiny_model().to("meta")
    run = Run(task, model, tiny_tokenizer(), units, rows, units, wanted, tmp_path, NoMeter())
    assert run.step.shaping.class_weights.device == torch.device("meta")


def fitted(rows) -> Classify:
    task = Classify()
    task.fit(rows)
    task.max_seq_len = 40
    return task


def step_of(model, adversarial: float) -> dict[str, torch.Tensor]:
    rows = texts(6, 0)
    task = fitted(rows)
    batch = task.build(rows, tiny_tokenizer()).batch(range(6))
    task_gradients(task, model, [batch], adversarial=adversarial)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_an_attack_adds_the_gradients_at_the_moved_embeddings() -> None:
    model, length = tiny_model(), 0.7
    before = copy.deepcopy(model.state_dict())
    both = step_of(model, length)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    clean_model = tiny_model()
    clean = step_of(clean_model, 0.0)
    moved = tiny_model()
    slope = clean["encoder.embeddings.word_embeddings.weight"]
    with torch.no_grad():
        moved.word_weight.add_(length * slope / slope.norm())
    there = step_of(moved, 0.0)
    name = "classifier.dense.weight"
    difference = (both[name] - clean[name] - there[name]).abs().max()
    assert difference <= 64 * torch.finfo(torch.float32).eps * both[name].abs().max()
    assert not torch.equal(both[name], 2 * clean[name])


def test_an_attack_on_frozen_embeddings() -> None:
    model = tiny_model()
    freeze_layers(model, "embeddings")
    with pytest.raises(InputError, match="--adversarial: the word embeddings are frozen"):
        step_of(model, 1.0)


def test_choices_of_one_size_lose_as_classes_do() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, generator=generator).double()
    labels = torch.tensor([0, 2, 1, 1])
    for shaping in (Shaping(), Shaping(None, 0.2)):
        ours = choice_loss(scores.flatten(), torch.arange(0, 13, 3), labels, shaping)
        theirs = class_loss(scores, labels, shaping)
        eps = 64 * torch.finfo(torch.float64).eps
        assert abs(ours.total - theirs.total) <= eps * theirs.total
        assert ours.correct == theirs.correct


def test_choices_of_several_sizes_lose_each_among_their_own() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0]).double()
    cu_units, labels = torch.tensor([0, 2, 5]), torch.tensor([1, 0])
    expected = -(scores[:2].log_softmax(0)[1] + scores[2:].log_softmax(0)[0])
    found = choice_loss(scores, cu_units, labels, Shaping())
    assert abs(found.total - expected) <= 64 * torch.finfo(torch.float64).eps * expected
    assert found.correct == 1


def test_smoothed_binary_targets() -> None:
    logits, values = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    ours = binary_loss(logits, values, Shaping(None, 0.2)).total
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor([[0.9, 0.1]])
    )
    assert abs(ours - theirs) <= 8 * torch.finfo(torch.float32).eps * theirs


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_in_batch_negatives_are_all_texts_but_the_anchors(smooth) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator).double(), dim=-1)
    cu_units = torch.tensor([0, 2, 5, 7])
    others = vectors[[1, 3, 4, 6]]
    scores = 20.0 * vectors[[0, 2, 5]] @ others.T
    expected = torch.nn.functional.cross_entropy(
        scores, torch.tensor([0, 1, 3]), reduction="sum", label_smoothing=smooth
    )
    found = in_batch_loss(vectors, cu_units, 20.0, Shaping(None, smooth))
    assert abs(found.total - expected) <= 64 * torch.finfo(torch.float64).eps * expected


def test_patience_ends_a_run_that_gets_no_better(config, monkeypatch) -> None:  # noqa: F811
    calls = []

    def worse(*arguments):
        calls.append(None)
        share = 1.0 / len(calls)
        figures = {"accuracy": share, "macro_f1": share, "majority": 0.5, "loss": 1.0}
        return finetune_run.Scores(figures)

    monkeypatch.setattr(finetune_run, "scored", worse)
    patient = dataclasses.replace(config, epochs=9, patience=2)
    report = finetune(Classify(), patient, say=lambda _: None)
    assert (report["evaluations"], report["steps"], report["kept_step"]) == (3, 24, 8)
    assert report["stopped_early"]
    with pytest.raises(InputError, match="--patience needs evaluations between"):
        dataclasses.replace(config, patience=1, evaluate_epochs=0)


def test_several_seeds_and_their_ensemble(config) -> None:  # noqa: F811
    several = dataclasses.replace(config, seeds=2, epochs=1)
    said: list[str] = []
    report = finetune_seeds(Classify(), several, say=said.append)
    out = Path(config.out)
    alone = [json.loads((out / f"seed-{n}" / "report.json").read_text()) for n in range(2)]
    assert report["seeds"] == 2
    assert report["accuracy"] == np.mean([one["accuracy"] for one in alone])
    assert report["accuracy_std"] == np.std([one["accuracy"] for one in alone], ddof=1)
    assert json.loads((out / "report.json").read_text()) == report
    both = Saved.from_pretrained(out)
    assert len(both.models) == 2
    rows = both.task.read(config.eval, said.append)
    units = both.build(rows)
    assert both.task.score(rows, units, both.run(units)).figures == report["ensemble"]
    # a finished run is told as such, and so is one that is asked for with other settings
    assert (
        finetune_seeds(Classify(), dataclasses.replace(several, resume=True), said.append) == report
    )
    with pytest.raises(InputError, match="holds a run already"):
        finetune_seeds(Classify(), several, said.append)


def test_the_spread_is_of_every_figure_that_is_a_number() -> None:
    found = spread([{"f1": 0.5, "steps": 3, "task": "tag"}, {"f1": 0.7, "steps": 3, "task": "tag"}])
    assert found == {"seeds": 2, "f1": 0.6, "f1_std": pytest.approx(np.std([0.5, 0.7], ddof=1))}


def test_several_seeds_read_their_files_as_one_does(config) -> None:  # noqa: F811
    for name in (config.train, config.eval):
        lines = Path(name).read_text().splitlines()[1:]
        Path(name).write_bytes("\n".join(f"caf\u00e9 {line}" for line in lines).encode("latin-1"))
    several = dataclasses.replace(config, seeds=2, epochs=1)
    task = Classify(encoding="iso-8859-1", columns="text,label")
    report = finetune_seeds(task, several, say=lambda _: None)
    assert set(report["ensemble"]) >= {"accuracy", "macro_f1"}


def test_several_seeds_go_on_after_a_kill_in_the_first(config, monkeypatch) -> None:  # noqa: F811
    several = dataclasses.replace(config, seeds=2, epochs=1)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as before:
        before.setattr(finetune_module, "finetune_from", killed)
        with pytest.raises(Killed):
            finetune_seeds(Classify(), several, say=lambda _: None)
    again = dataclasses.replace(several, resume=True)
    assert finetune_seeds(Classify(), again, say=lambda _: None)["seeds"] == 2
