from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch

from fastbert.errors import InputError
from fastbert.models import Targets
from fastbert.training import meter as module
from fastbert.training.meter import METRICS_FILE, Meter, _brief, read_metrics
from fastbert.training.result import StepResult
from fastbert.training.schedule import Budget
from fastbert.training.state import TrainState

BUDGET = Budget(max_steps=10)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    hands = Clock()
    monkeypatch.setattr(module, "time", hands)
    return hands


def result(loss: float, masked: int = 4, pairs: int = 0, tokens: int = 100) -> StepResult:
    found = StepResult(tokens, Targets(masked, pairs))
    found.add("masked_lm_loss", torch.tensor(loss))
    found.add("masked_lm_correct", torch.tensor(1))
    if pairs:
        found.add("sequence_loss", torch.tensor(3.0))
        found.add("sequence_correct", torch.tensor(2))
    return found


def take(meter: Meter, state: TrainState, clock, seconds: float, step: StepResult) -> None:
    clock.now += seconds
    state.step += 1
    state.tokens += step.tokens
    state.seconds += seconds
    meter.step(state, step, 0.25, BUDGET)


def test_results_add_sums():
    total = result(2.0)
    total.add("masked_lm_loss", torch.tensor(5.0))
    total.add("sequence_loss", None)
    assert total.sums["masked_lm_loss"] == 7.0 and "sequence_loss" not in total.sums


def test_records_are_means_over_the_targets_since_the_last(tmp_path, clock):
    meter, state = Meter(tmp_path, "train", io.StringIO()), TrainState()
    take(meter, state, clock, 1.0, result(8.0, masked=4, pairs=2))
    assert meter.last_loss == 2.0 + 1.5
    take(meter, state, clock, 1.0, result(6.0, masked=2))
    assert len(read_metrics(tmp_path)) == 1
    take(meter, state, clock, 1.0, result(9.0, masked=8))
    first, second = read_metrics(tmp_path)
    assert first.pop("memory_gib") > 0.0
    assert first == {
        "step": 1,
        "tokens": 100,
        "seconds": 1.0,
        "learning_rate": 0.25,
        "tokens_per_s": 100.0,
        "left_s": 9.0,
        "masked_lm_loss": 2.0,
        "masked_lm_accuracy": 0.25,
        "sequence_loss": 1.5,
        "sequence_accuracy": 1.0,
    }
    assert second["step"] == 3 and second["tokens_per_s"] == 100.0
    assert second["masked_lm_loss"] == meter.last_loss == 1.5
    assert "sequence_loss" not in second


def test_room_time_and_device_are_accounted_for(tmp_path, clock):
    meter = Meter(tmp_path, "train", shown := io.StringIO(), peak=4e12)
    state = TrainState()
    steps = [result(8.0), result(8.0), result(8.0)]
    for step, waited_s in zip(steps, (0.5, 0.0, 0.25), strict=True):
        step.slots, step.operations, step.waited_s = 128, 1e12, waited_s
        take(meter, state, clock, 1.0, step)
    first, second = read_metrics(tmp_path)
    assert first["packing"] == round(100 / 128, 4) == second["packing"]
    # the second record holds two steps of a second each
    assert (first["loader_stall"], second["loader_stall"]) == (0.5, 0.125)
    assert first["tflop_per_s"] == second["tflop_per_s"] == 1.0
    assert first["mfu"] == second["mfu"] == 0.25
    assert (first["left_s"], second["left_s"]) == (9.0, 7.0)
    line = shown.getvalue().splitlines()[0]
    assert "MFU 25.0%" in line and "stalled 50%" in line and "9 left" in line


def test_the_last_step_is_recorded(tmp_path, clock):
    meter, state = Meter(tmp_path, "train", io.StringIO()), TrainState(step=8)
    take(meter, state, clock, 0.1, result(8.0))
    take(meter, state, clock, 0.1, result(4.0))
    assert [r["step"] for r in read_metrics(tmp_path)] == [10]
    assert read_metrics(tmp_path)[0]["masked_lm_loss"] == 1.5


def test_flush_records_what_is_left_and_only_that(tmp_path, clock):
    meter, state = Meter(tmp_path, "train", io.StringIO()), TrainState(step=3)
    meter.flush(state, 0.25, BUDGET)
    assert not (tmp_path / METRICS_FILE).exists()
    take(meter, state, clock, 0.1, result(8.0))
    meter.flush(state, 0.25, BUDGET)
    meter.flush(state, 0.25, BUDGET)
    assert [r["step"] for r in read_metrics(tmp_path)] == [4]


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path, clock):
    meter, state = Meter(tmp_path, "train", io.StringIO()), TrainState()
    take(meter, state, clock, 1.0, result(math.nan))
    assert math.isnan(meter.last_loss)
    text = (tmp_path / METRICS_FILE).read_text()

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(text, parse_constant=refuse)["masked_lm_loss"] is None


def test_every_line_is_json_and_a_resumed_run_appends(tmp_path, clock):
    state = TrainState()
    for _ in range(2):
        meter = Meter(tmp_path, "train", io.StringIO())
        take(meter, state, clock, 3.0, result(8.0))
        meter.evaluation(state, {"mlm_loss": 1.25})
        meter.close()
    lines = (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 2, 2]
    assert json.loads(lines[1])["eval"] == {"mlm_loss": 1.25}


def test_the_time_of_an_evaluation_is_not_the_steps(tmp_path, clock):
    meter, state = Meter(tmp_path, "train", io.StringIO()), TrainState()
    take(meter, state, clock, 1.0, result(8.0))
    take(meter, state, clock, 1.0, result(8.0))
    with meter.paused():
        clock.now += 50.0
        meter.evaluation(state, {"mlm_loss": 1.25})
    take(meter, state, clock, 3.0, result(8.0))
    assert read_metrics(tmp_path)[-1]["tokens_per_s"] == 50.0


def test_a_log_gets_a_plain_line_now_and_then(tmp_path, clock):
    log, state = io.StringIO(), TrainState()
    meter = Meter(tmp_path, "train", log)
    for _ in range(5):
        take(meter, state, clock, 6.0, result(8.0))
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train  10%  step 1  mlm loss 2.000  masked acc 25.0%")
    assert "real tok/s 17" in lines[0] and lines[0].endswith("0:54 left")
    assert "\r" not in log.getvalue()


def test_a_terminal_gets_a_bar(tmp_path, clock):
    screen, state = Terminal(), TrainState()
    meter = Meter(tmp_path, "train", screen)
    take(meter, state, clock, 6.0, result(8.0, pairs=2))
    meter.say("a line above")
    take(meter, state, clock, 6.0, result(8.0, pairs=2))
    meter.close()
    meter.close()
    for shown in ("train", "mlm 2.00 25%", "seq 1.50 100%", "0:48 left", "a line above\n"):
        assert shown in screen.getvalue()


def test_the_stream_is_the_error_output(tmp_path):
    assert Meter(tmp_path, "train").stream is sys.stderr


def test_metrics_that_cannot_be_written(tmp_path, clock):
    meter = Meter(tmp_path / "gone", "train", io.StringIO())
    with pytest.raises(InputError, match="cannot write"):
        take(meter, TrainState(), clock, 1.0, result(8.0))


@pytest.mark.parametrize(
    "seconds, shown", [(0, "0:00"), (61.9, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_clock(seconds, shown):
    assert module._clock(seconds) == shown


def test_half_a_record_left_by_a_killed_run_is_dropped(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2}\n{"ste')
    Meter(tmp_path, "again")
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_the_bar_fits_a_terminal_of_80_columns():
    record = {
        "masked_lm_loss": 9.123,
        "masked_lm_accuracy": 0.99,
        "sequence_loss": 1.69,
        "sequence_accuracy": 1.0,
        "tokens_per_s": 99456.7,
    }
    line = f"100%|{'#' * 5}| pre-trained 59:59 left{_brief(record)}"
    assert "99.5k tok/s  mlm 9.12 99%  seq 1.69 100%" in line
    assert len(line) <= 80
