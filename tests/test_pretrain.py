"""Runs of `pretrain` with everything that a recipe may ask for, and what they leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main
from fastbert.data.loader import Loader
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining
from fastbert.training import loop
from fastbert.training.meter import read_metrics
from fastbert.training.pretrain import PretrainConfig, pretrain
from fastbert.training.state import checkpoints

TEXT = "\n\n".join(
    f"The ship number {n} left the harbour.\nIt carried {n} barrels of oil.\nNobody saw it again."
    for n in range(60)
)
GROWING = {
    "first_seq_len": 16,
    "first_accumulation": 1,
    "first_share": 0.5,
    "accumulation": 3,
    "ramp_share": 0.8,
    "ema": 0.9,
    "layer_decay": 0.8,
    "keep_checkpoints": 3,
    "spike_steps": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ships.txt"
    path.write_text(TEXT, encoding="utf-8")
    words = ["tokenizer", "train", str(path), "--vocab-size", "200", "--out"]
    assert main([*words, str(path.parent / "tok")]) == 0
    return path


def go(text: Path, out: Path, resume: bool = False, said: list | None = None, **fields):
    config = PretrainConfig(
        **{
            "out": str(out),
            "size": "tiny",
            "max_steps": 10,
            "token_budget": 256,
            "max_seq_len": 32,
            "dtype": "fp32",
            "checkpoint_minutes": 1e-9,
            **fields,
        }
    )
    say = (lambda line: None) if said is None else said.append
    return pretrain([str(text)], str(text.parent / "tok"), config, resume=resume, say=say)


@pytest.fixture(scope="module")
def grown(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grown") / "run"
    assert go(text, folder, **GROWING)["steps"] == 10
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: Path, right: Path) -> bool:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stops", [(4, 2), (9,)])
def test_a_growing_run_is_the_same_however_often_it_stops(
    grown, text, stops, tmp_path, monkeypatch
):
    original, left = Loader.__next__, [0]

    def stopping(self):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Loader, "__next__", stopping)
    for number, stop in enumerate(stops):
        left[0] = stop
        assert go(text, tmp_path / "run", resume=number > 0, **GROWING) == {}
    report = go(text, tmp_path / "run", resume=True, **GROWING)
    assert same(grown / "model", tmp_path / "run" / "model")
    ours = json.loads((grown / "report.json").read_text())
    for name in ("mlm_loss_heldout", "mlm_loss_heldout_without_ema", "packing_efficiency"):
        assert report[name] == ours[name], name


@pytest.fixture
def torn(monkeypatch):
    """A signal that nobody waits for is an error of its own, in place of the end of the tests."""

    def tear(number, frame):
        raise AssertionError("torn off")

    before = signal.signal(signal.SIGTERM, tear)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_before_the_first_step_is_one_after_it(text, torn, tmp_path):
    said: list[str] = []

    class Listener(list):
        def append(self, line: str) -> None:
            said.append(line)
            if line.startswith("pre-training"):
                os.kill(os.getpid(), signal.SIGTERM)

    assert go(text, tmp_path / "run", said=Listener()) == {}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert said[-1].startswith("to go on")


def test_a_signal_does_not_silence_the_error_that_ends_a_run(text, torn, tmp_path, monkeypatch):
    """torchrun sends one to each process whose peer is lost, while it still tidies up."""

    def lost(self):
        raise InputError("another rank is gone")

    close = Loader.close

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Loader, "__next__", lost)
    monkeypatch.setattr(Loader, "close", signalled)
    with pytest.raises(InputError, match="another rank is gone"):
        go(text, tmp_path / "run")


def test_the_mean_of_the_weights_is_scored_and_saved(grown, text, tmp_path):
    report = json.loads((grown / "report.json").read_text())
    assert report["mlm_loss_heldout"] != report["mlm_loss_heldout_without_ema"]
    plain = go(text, tmp_path / "run", **{**GROWING, "ema": 0.0})
    assert plain["mlm_loss_heldout"] == report["mlm_loss_heldout_without_ema"]
    assert not same(grown / "model", tmp_path / "run" / "model")
    # the last checkpoint holds the weights as they were left, not their mean
    last = load_file(checkpoints(grown)[-1] / "model.safetensors")
    bias = weights(tmp_path / "run" / "model")["cls.predictions.bias"]
    assert torch.equal(last["masked_lm.bias"], bias)


def test_rates_fall_from_layer_to_layer(text, tmp_path, monkeypatch):
    seen = []
    original = loop.train

    def watching(model, optimizers, *rest, **options):
        peaks = dict(zip(map(id, optimizers._groups), optimizers._peaks, strict=True))
        for group in optimizers._groups:
            names = [optimizers.names[p] for p in group["params"]]
            seen.extend((name, peaks[id(group)]) for name in names)
        return original(model, optimizers, *rest, **options)

    monkeypatch.setattr("fastbert.training.pretrain_run.train", watching)
    go(text, tmp_path / "run", max_steps=1, layer_decay=0.5, optimizer="adamw", learning_rate=1e-3)
    rates = dict(seen)
    assert rates["encoder.layers.1.qkv.weight"] == 1e-3
    assert rates["encoder.layers.0.qkv.weight"] == 0.5e-3
    assert rates["encoder.embeddings.word_embeddings.weight"] == 0.25e-3
    assert rates["masked_lm.dense.weight"] == 1e-3


def test_checkpoints_stay_as_many_as_asked(grown, text, tmp_path):
    assert [path.name for path in checkpoints(grown)] == [f"step-{n:08d}" for n in (8, 9, 10)]
    go(text, tmp_path / "run", max_steps=3)
    assert checkpoints(tmp_path / "run") == []


def test_the_mean_of_a_runs_checkpoints(grown, tmp_path, capsys):
    out = tmp_path / "mean"
    assert main(["average", str(grown), "--out", str(out)]) == 0
    assert "the mean of 3 checkpoints, step-00000008 to step-00000010" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {p.name for p in (grown / "model").iterdir()}
    model = BertForPreTraining.from_pretrained(out)
    states = [load_file(path / "model.safetensors") for path in checkpoints(grown)]
    for name, parameter in model.state_dict().items():
        expected = torch.stack([state[name].double() for state in states]).mean(0).float()
        # both round a sum of three once
        assert torch.equal(parameter, expected), name
    assert main(["average", str(grown), "--last", "2", "--out", str(tmp_path / "two")]) == 0
    assert not same(out, tmp_path / "two")


def test_the_mean_of_models(grown, tmp_path):
    out = tmp_path / "mean"
    models = [str(grown), str(grown / "model")]
    assert main(["average", *models, "--out", str(out)]) == 0
    # of a model and itself
    assert same(out, grown / "model")


def test_what_cannot_be_averaged_is_one_line(grown, text, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["average", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    new = ["--out", str(tmp_path / "new")]
    small = tmp_path / "small"
    go(text, small, max_steps=1, objective="mlm")
    capsys.readouterr()
    assert "nothing to average" in refused(str(small), *new)
    assert "is in it or in" in refused(str(grown), str(small), *new)
    assert "--last must be 2 to 3" in refused(str(grown), "--last", "4", *new)
    assert "--last: counts the checkpoints of one run" in refused(
        str(grown), str(small), "--last", "2", *new
    )
    assert "is there already" in refused(str(grown), "--out", str(small))
    config = BertForMaskedLM.from_pretrained(small / "model").config
    other = BertForMaskedLM.from_config(
        type(config)(**{**config.__dict__, "intermediate_size": 64}), 0
    )
    other.save_pretrained(tmp_path / "wide")
    assert "has shape" in refused(str(small), str(tmp_path / "wide"), *new)
    damaged = checkpoints(grown)[0] / "model.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert "does not fit its checksum" in refused(str(grown), *new)
    finally:
        damaged.write_bytes(whole)
    assert not (tmp_path / "new").exists()


def test_the_last_score_reaches_the_event_file(text, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = go(text, tmp_path / "run", max_steps=2, log_to="tensorboard")
    files = list((tmp_path / "run" / "tensorboard").iterdir())
    assert len(files) == 1
    events = EventAccumulator(str(files[0])).Reload()
    last = events.Scalars("heldout/mlm_loss")[-1]
    # event files hold fp32
    assert (last.step, last.value) == (2, float(torch.tensor(report["mlm_loss_heldout"])))
    assert len(events.Scalars("masked_lm_loss")) > 0 and len(events.Scalars("packing")) > 0


def test_the_best_model_is_kept(text, tmp_path, monkeypatch):
    """A run that gets worse in the end: rates a ten-thousandfold from the sixth step on."""
    original = loop.learning_rate_factor
    monkeypatch.setattr(
        loop,
        "learning_rate_factor",
        lambda schedule, progress, warmup: (
            original(schedule, progress, warmup) * (1e4 if progress > 0.55 else 1.0)
        ),
    )
    options = {"evaluate_minutes": 1e-9, "keep_best": True, "objective": "mlm", "spike_sigma": 0.0}
    said: list[str] = []
    report = go(text, tmp_path / "run", said=said, **options)
    records = read_metrics(tmp_path / "run")
    scores = {r["step"]: r["eval"]["mlm_loss"] for r in records if "eval" in r}
    assert report["best_mlm_loss"] == min(scores.values()) < report["mlm_loss_heldout"]
    assert scores[report["best_step"]] == report["best_mlm_loss"] and report["best_step"] < 10
    assert not same(tmp_path / "run" / "best", tmp_path / "run" / "model")
    assert f"at step {report['best_step']}: model in {tmp_path / 'run' / 'best'}" in said[-1]
    # what is in the folder is what had that score
    for name in ("config.json", "tokenizer.json", "pretraining.json"):
        best, last = (tmp_path / "run" / folder / name for folder in ("best", "model"))
        assert best.read_bytes() == last.read_bytes()
