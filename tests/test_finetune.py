from __future__ import annotations

import copy
import dataclasses
import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import SEEDS, ErrorRule
from safetensors.torch import load_file
from tiny import WORDS, stirred, task_gradients, tiny_config, tiny_tokenizer

from fastbert.data.epochs import EpochStream
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.models import BertForPreTraining, BertForSequenceClassification
from fastbert.tasks.classify import Classify
from fastbert.tasks.saved import Saved
from fastbert.tasks.table import Row
from fastbert.tasks.task import Scores
from fastbert.training import finetune as finetune_module
from fastbert.training import finetune_run
from fastbert.training.finetune import finetune, finetune_from
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.meter import Meter, read_metrics
from fastbert.training.state import save_checkpoint

# the two halves of the vocabulary are the two classes
CLASSES = {"land": WORDS[:10], "sea": WORDS[10:]}


def texts(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    names = list(CLASSES)
    return [
        Row(" ".join(rng.choice(CLASSES[name], int(rng.integers(2, 12)))), name)
        for name in rng.choice(names, count)
    ]


def write_table(path: Path, rows: list[Row]) -> str:
    lines = ["sentence\tlabel", *(f"{row.text}\t{row.label}" for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def pictures_where_they_are_looked_at(request, monkeypatch) -> None:
    # a picture takes longer to draw than a tiny model to train
    if request.function is not test_two_commands_worth_of_work:
        monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A run of pre-training, as far as fine-tuning looks."""
    folder = tmp_path / "pretrained" / "model"
    config = tiny_config(
        vocab_size=tiny_tokenizer().vocab_size, labels=[], max_position_embeddings=40
    )
    BertForPreTraining.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder.parent


@pytest.fixture
def config(tmp_path, pretrained) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(pretrained),
        train=write_table(tmp_path / "train.tsv", texts(60, 0)),
        eval=write_table(tmp_path / "dev.tsv", texts(30, 1)),
        out=str(tmp_path / "out"),
        epochs=3,
        batch_size=8,
        learning_rate=1e-2,
        dropout=0.2,
        dtype="fp32",
    )


def quietly(config: FinetuneConfig, **options) -> dict:
    return finetune(Classify(**options), config, say=lambda _: None)


def weights(config: FinetuneConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model" / "model.safetensors")


def same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        torch.equal(ours[name], expected[name]) for name in expected
    )


def test_two_commands_worth_of_work(config) -> None:
    said: list[str] = []
    report = finetune(Classify(), config, say=said.append)
    out = Path(config.out)
    assert report["accuracy"] >= 0.9 > report["majority"]
    assert report["steps"] == 3 * 8 and report["epochs"] == 3.0
    assert (report["train_rows"], report["eval_rows"]) == (60, 30)
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "metrics.jsonl").is_file() and (out / "curves.png").is_file()
    assert not (out / "checkpoints").exists()
    assert any("new weights for the classifier" in line for line in said)
    assert sum("(guessed;" in line for line in said) == 1
    assert any("first text: {" in line for line in said)
    raw = json.loads((out / "model" / "config.json").read_text())
    assert raw["architectures"] == ["BertForSequenceClassification"]
    assert raw["hidden_dropout_prob"] == raw["attention_probs_dropout_prob"] == 0.2
    assert raw["id2label"] == {"0": "land", "1": "sea"}
    assert (
        json.loads((out / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 40
    )


def test_the_saved_model_scores_what_the_report_says(config) -> None:
    report = quietly(config)
    saved = Saved.from_pretrained(config.out)
    assert (saved.task.pair, saved.task.max_seq_len) == (False, 40)
    rows = texts(30, 1)
    units = saved.build(rows)
    figures = saved.task.score(rows, units, saved.run(units)).figures
    assert figures == {name: report[name] for name in figures}


def interrupting(step: int):
    """Meter.step that presses Ctrl-C after one step."""
    original = Meter.step

    def press(self, state, *arguments):
        original(self, state, *arguments)
        if state.step == step:
            signal.raise_signal(signal.SIGINT)

    return press


# in the first epoch, at the end of one, one step before the end
@pytest.mark.parametrize("step", [3, 8, 23])
def test_a_resumed_run_is_the_run_never_stopped(config, tmp_path, monkeypatch, step) -> None:
    whole = quietly(config)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "step", interrupting(step))
        said: list[str] = []
        assert finetune(Classify(), stopped, say=said.append) == {}
        assert f"interrupted at step {step}" in said[-1] and "--resume" in said[-1]
    resumed = quietly(dataclasses.replace(stopped, resume=True))
    assert same(weights(stopped), weights(config))
    for name in ("accuracy", "macro_f1", "loss", "kept_step", "evaluations", "steps", "tokens"):
        assert resumed[name] == whole[name]


def test_interrupted_in_an_evaluation_and_resumed(config, tmp_path, monkeypatch) -> None:
    whole = quietly(config)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    original = finetune_run.scored

    def press(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_run, "scored", press)
        assert quietly(stopped) == {}
    resumed = quietly(dataclasses.replace(stopped, resume=True))
    assert same(weights(stopped), weights(config))
    assert resumed["evaluations"] == whole["evaluations"] == 3


def test_periodic_checkpoints_change_nothing(config, tmp_path, monkeypatch) -> None:
    quietly(config)
    often = dataclasses.replace(config, out=str(tmp_path / "often"), checkpoint_minutes=0.0)
    saved = []

    def spy(folder, state, model, optimizers):
        saved.append(state.step)
        save_checkpoint(folder, state, model, optimizers)

    monkeypatch.setattr(finetune_run, "save_checkpoint", spy)
    quietly(often)
    assert saved == [8, 16]
    assert same(weights(often), weights(config))


def worse_every_time(monkeypatch) -> None:
    calls = []

    def worse(*arguments):
        calls.append(None)
        share = 1.0 / len(calls)
        return Scores({"accuracy": share, "macro_f1": share, "majority": 0.5, "loss": 1.0})

    monkeypatch.setattr(finetune_run, "scored", worse)


def test_the_best_evaluation_is_kept(config, tmp_path, monkeypatch) -> None:
    first = dataclasses.replace(config, out=str(tmp_path / "first"), evaluate_epochs=0)
    worse_every_time(monkeypatch)
    report = quietly(config)
    assert (report["kept_step"], report["evaluations"], report["accuracy"]) == (8, 3, 1.0)
    report = quietly(dataclasses.replace(first, keep_best=False))
    assert (report["kept_step"], report["evaluations"]) == (24, 1)
    last = dataclasses.replace(config, out=str(tmp_path / "last"), keep_best=False)
    assert quietly(last)["kept_step"] == 24
    assert same(weights(last), weights(first))
    assert not same(weights(config), weights(last))


def test_the_model_in_memory_is_the_one_kept(tmp_path, config, monkeypatch) -> None:
    worse_every_time(monkeypatch)
    task = Classify()
    task.labels = list(CLASSES)
    model, _ = task.load(Path(config.model) / "model")
    folder = Path(config.out)
    folder.mkdir()
    said, stream = [], io.StringIO()
    report = finetune_from(
        model,
        tiny_tokenizer(),
        texts(20, 0),
        texts(9, 1),
        config,
        folder,
        label="fresh",
        say=said.append,
        stream=stream,
    )
    assert report["kept_step"] == 3 and report["steps"] == 9
    kept = BertForSequenceClassification.from_pretrained(folder / "model").state_dict()
    assert same(model.state_dict(), kept)
    assert all(line.startswith("fresh: ") for line in said)
    assert stream.getvalue().startswith("fresh")


def test_training_learns_with_muon_and_accumulation_too(config) -> None:
    muon = dataclasses.replace(config, optimizer="muon", learning_rate=2e-2, epochs=12)
    report = quietly(dataclasses.replace(muon, accumulation=2))
    assert report["accuracy"] >= 0.9


def fitted(rows: list[Row]) -> Classify:
    task = Classify()
    task.fit(rows)
    task.max_seq_len = 40
    return task


def test_micro_batches_give_the_gradient_of_their_step() -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        vocab_size = tiny_tokenizer().vocab_size
        shape = tiny_config(vocab_size=vocab_size, labels=list(CLASSES))
        model = stirred(BertForSequenceClassification.from_config(shape, seed), seed)
        task = fitted(texts(17, seed))
        units = task.build(texts(17, seed), tiny_tokenizer())
        ours, baseline, oracle = (
            step(task, model, units, accumulation, seed, dtype)
            for accumulation, dtype in ((3, torch.float32), (1, torch.float32), (1, torch.float64))
        )
        assert ours.keys() == oracle.keys()
        for name in oracle:
            rule.compare(name, ours[name], baseline[name], oracle[name])
    rule.assert_within()


def step(task, model, units, accumulation, seed, dtype) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).to(dtype)
    stream = EpochStream(units, len(units), accumulation, seed)
    batches = [batch for batch, _ in stream.epoch_batches(Position())]
    assert len(batches) == accumulation
    task_gradients(task, model, batches)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_pairs_are_remembered(config, tmp_path) -> None:
    for name in ("train", "dev"):
        rows = texts(12, 0)
        lines = ["sentence1\tsentence2\tlabel", *(f"{r.text}\tstone\t{r.label}" for r in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    quietly(dataclasses.replace(config, epochs=1))
    assert Saved.from_pretrained(config.out).task.pair


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"epochs": 2.5}, 25),
        ({"epochs": 0.01}, 1),
        ({"epochs": 2.5, "max_steps": 7}, 7),
        ({}, 200),
    ],
)
def test_how_long_a_run_is(config, fields, steps) -> None:
    config = dataclasses.replace(config, **{"epochs": None, **fields})
    assert config.steps(10) == steps


def test_small_files_get_more_epochs_and_large_ones_three(config) -> None:
    config = dataclasses.replace(config, epochs=None)
    assert [config.steps(n) for n in (1, 10, 50, 100, 2000)] == [20, 200, 200, 300, 6000]


def test_narrow_models_get_larger_steps(config) -> None:
    by_width = dataclasses.replace(config, learning_rate=None)
    assert [by_width.peak(n) for n in (128, 256, 384, 768, 1024)] == [3e-4, 3e-4, 1e-4, 5e-5, 3e-5]
    assert config.peak(768) == 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "--epochs must be more than 0, got 0"),
        ({"max_steps": 0}, "--max-steps must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"accumulation": 0}, "--accumulation must be at least 1"),
        ({"learning_rate": -1.0}, "--learning-rate must be more than 0"),
        ({"warmup": 1.0}, "--warmup must be in"),
        ({"dropout": -0.1}, "--dropout must be in"),
        ({"max_seq_len": 4}, "--max-seq-len must be at least 8"),
        ({"dtype": "fp8"}, "--dtype must be one of"),
        (
            {"optimizer": "sgd"},
            "--optimizer must be one of adamw, muon, lamb, stable-adamw, got 'sgd'",
        ),
    ],
)
def test_settings_out_of_range(config, fields, message) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seq_len": 41}, r"--max-seq-len 41: .* has 40 positions"),
        ({"train": "none.tsv"}, r"none.tsv: no such file"),
        ({"eval": "none.tsv"}, r"none.tsv: no such file"),
        ({"model": "nowhere"}, r"nowhere: no model here"),
        ({"accumulation": 8}, r"--accumulation must be at most the 7 examples of a step, got 8"),
        ({"resume": True}, r"--resume: .* holds no run"),
    ],
)
def test_bad_input_leaves_nothing_behind(config, fields, message) -> None:
    with pytest.raises(InputError, match=message):
        quietly(dataclasses.replace(config, **fields))
    assert not Path(config.out).exists()


def test_a_column_that_is_not_there(config) -> None:
    with pytest.raises(InputError, match=r"train.tsv: no column 'class' \(--label-column\)"):
        quietly(config, label_column="class")
    assert not Path(config.out).exists()


def test_a_class_seen_only_in_evaluation(config) -> None:
    write_table(Path(config.eval), [*texts(3, 0), Row("river", "air")])
    with pytest.raises(InputError, match=r"dev.tsv:5: the class 'air' is not among"):
        quietly(config)
    assert not Path(config.out).exists()


def test_a_tokenizer_of_another_model(config) -> None:
    folder = Path(config.model) / "model"
    shape = tiny_config(vocab_size=tiny_tokenizer().vocab_size - 1, labels=[])
    BertForPreTraining.from_config(shape).save_pretrained(folder)
    with pytest.raises(InputError, match="they are not of one model"):
        quietly(config)


def test_nothing_of_another_run_is_overwritten(config) -> None:
    folder = Path(config.out)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        quietly(config)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_finished_run_is_not_run_again(config) -> None:
    report = quietly(dataclasses.replace(config, epochs=1))
    before = weights(config)
    with pytest.raises(InputError, match="holds a run already"):
        quietly(dataclasses.replace(config, epochs=1))
    said: list[str] = []
    again = finetune(
        Classify(), dataclasses.replace(config, epochs=1, resume=True), say=said.append
    )
    assert again == report and "finished" in said[-1]
    with pytest.raises(InputError, match="other settings: epochs was 1, now 3"):
        quietly(dataclasses.replace(config, resume=True))
    assert same(weights(config), before)


def test_evaluations_are_recorded(config) -> None:
    report = quietly(config)
    evaluations = [r for r in read_metrics(config.out) if "eval" in r]
    assert [r["step"] for r in evaluations] == [8, 16, 24]
    best = max(evaluations, key=lambda r: (r["eval"]["accuracy"], -r["eval"]["loss"]))
    assert best["step"] == report["kept_step"] and best["eval"]["loss"] == report["loss"]
