"""Records sent elsewhere: what arrives in an event file, and what a stand-in for wandb is told."""

from __future__ import annotations

import io
import math
import sys
import types

import pytest

from fastbert.errors import InputError
from fastbert.training import trackers as module
from fastbert.training.meter import Meter
from fastbert.training.state import TrainState
from fastbert.training.trackers import TENSORBOARD_FOLDER, open_trackers, parse_trackers, scalars


def evaluated(folder, names: str, steps: range, settings=None) -> None:
    """A meter that is told of an evaluation at each step."""
    opened = open_trackers(names, folder, settings or {"size": "tiny"}, steps.start - 1)
    meter = Meter(folder, "pretrain", io.StringIO(), opened)
    for step in steps:
        meter.evaluation(TrainState(step=step, seconds=2.0 * step), {"mlm_loss": 10.0 - step})
    meter.close()


def test_an_event_file_holds_every_record(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluated(tmp_path, "tensorboard", range(1, 4))
    # killed after a step that its checkpoint does not hold, and gone on with
    evaluated(tmp_path, "tensorboard", range(3, 6))
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    events.Reload()
    found = events.Scalars("heldout/mlm_loss")
    assert [(event.step, event.value) for event in found] == [(n, 10.0 - n) for n in range(1, 6)]
    assert [event.value for event in events.Scalars("seconds")] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert "settings/text_summary" in events.Tags()["tensors"]


class StandIn(types.ModuleType):
    """What is asked of wandb, noted."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, figures: dict) -> None:
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_is_told_every_record(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: wandb)
    evaluated(tmp_path, "wandb", range(1, 3), {"size": "mini"})
    evaluated(tmp_path, "wandb", range(3, 4), {"size": "mini"})
    assert [figures["step"] for figures in wandb.logged] == [1, 2, 3]
    assert wandb.logged[1] == {"step": 2, "seconds": 4.0, "heldout/mlm_loss": 8.0}
    assert wandb.finished == 2
    first, second = wandb.started
    assert first["config"] == {"size": "mini"} and first["dir"] == str(tmp_path)
    # a resumed run is the same run
    assert first["id"] == second["id"] and first["resume"] == "allow"


def test_names():
    assert parse_trackers("") == []
    with pytest.raises(InputError, match="--log-to must be tensorboard or wandb, or both, got 'x'"):
        parse_trackers("tensorboard, x")


@pytest.mark.parametrize("name", module.NAMES)
def test_what_is_not_installed_names_its_extra(name, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda found: None)
    with pytest.raises(InputError, match=rf"--log-to {name}: .*pip install 'fastbert\[{name}\]'"):
        parse_trackers(name)


def test_only_finite_numbers_travel():
    record = {"step": 3, "loss": math.nan, "rate": 0.5, "spike": {"loss": 9.0, "samples": [1, 2]}}
    assert dict(scalars(record, "")) == {"rate": 0.5, "spike/loss": 9.0}
