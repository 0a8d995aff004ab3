"""Spikes: seen from values that arrive later, undone, and undone again alike after a stop."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import signal
import statistics
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_corpus, tiny_tokenizer

from fastbert.data.objectives import Objective
from fastbert.data.stream import PretrainingStream, StreamConfig, prefetch
from fastbert.models import BertForPreTraining
from fastbert.training import spikes as module
from fastbert.training.loop import LoopConfig, train
from fastbert.training.meter import Meter, read_metrics
from fastbert.training.optimizer import Optimizers
from fastbert.training.schedule import Budget
from fastbert.training.spikes import Figures, Level, Levels, SpikeGuard
from fastbert.training.state import TrainState, load_checkpoint

STREAM = StreamConfig(Objective("sop"), token_budget=128, max_seq_len=40, seed=3)
STEPS, EVERY, ACCUMULATION = 40, 8, 2
# counted over all that the run takes from its text
BURST = 27


class Run:
    """A run whose learning rate is a thousandfold in one step."""

    def __init__(
        self, folder, *, resume=False, guarded=True, bursts=(BURST,), sigma=8.0, steps=STEPS
    ):
        self.folder, self.bursts = folder, bursts
        folder.mkdir(exist_ok=True)
        config = tiny_config(vocab_size=tiny_tokenizer().vocab_size)
        self.model = BertForPreTraining.from_config(config, 4)
        self.optimizers = Optimizers(self.model, "adamw", learning_rate=1e-3)
        self.guard = SpikeGuard(self.model, self.optimizers, sigma, EVERY) if guarded else None
        self.state = TrainState()
        if resume:
            self.state = load_checkpoint(folder, self.model, self.optimizers, keeper=self.guard)
        self.config = LoopConfig(
            Budget(max_steps=steps), accumulation=ACCUMULATION, dtype="fp32", schedule="constant"
        )
        self.log = io.StringIO()
        self.seen: list[list[int]] = []

    def go(self, stop_before: int | None = None, leave_out: range = range(0)) -> bool:
        """Train; a signal comes in the step that takes the text's group `stop_before`."""
        stream = PretrainingStream(tiny_corpus(), tiny_tokenizer(), STREAM, self.state.position)
        with closing(prefetch(stream)) as prefetched:
            meter = Meter(self.folder, "train", self.log)
            return train(
                self.model,
                self.optimizers,
                self._batches(prefetched, stop_before, leave_out),
                self.config,
                self.state,
                meter,
                self.folder,
                guard=self.guard,
            )

    def _batches(self, prefetched, stop_before, leave_out):
        peaks = list(self.optimizers._peaks)
        number = self.state.groups
        while True:
            group = list(islice(prefetched, ACCUMULATION))
            if number not in leave_out:
                rate = 1000.0 if number in self.bursts else 1.0
                self.optimizers._peaks = [peak * rate for peak in peaks]
                if number == stop_before:
                    os.kill(os.getpid(), signal.SIGINT)
                self.seen.append([i for batch, _ in group for i in _indices(batch)])
                yield from group
            number += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict() | self.optimizers.state_tensors()


def _indices(batch) -> list[int]:
    return batch.sample_ids[: batch.num_sequences].tolist()


def same(left: Run, right: Run) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    # so that a run of seconds has seen enough to judge by
    monkeypatch.setattr(module, "FEWEST", 12)


@pytest.fixture(scope="module")
def spiked(tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEWEST", 12)
        run = Run(tmp_path_factory.mktemp("spiked") / "run")
        assert run.go() is True
    return run


def test_a_spike_is_undone_and_said(spiked):
    # the burst is step 28, its loss is that of step 29, read two steps after it; the last copy
    # is that of step 24
    assert spiked.state.rollbacks == [{"from_step": 25, "to_step": 29 + module.LAG}]
    assert spiked.state.step == STEPS and spiked.state.left_out == 31 - 24
    assert spiked.state.groups == len(spiked.seen) == STEPS + 7
    # what is usual, too, is what it was at the copy
    assert spiked.guard.levels.loss.count == STEPS
    records = read_metrics(spiked.folder)
    found = [record for record in records if "spike" in record]
    assert len(found) == 1 and (found[0]["from_step"], found[0]["to_step"]) == (25, 31)
    assert found[0]["spike"]["step"] == 29
    assert found[0]["spike"]["samples"] == spiked.seen[28]
    assert found[0]["spike"]["loss"] > 2 * found[0]["spike"]["usual_loss"]
    line = next(line for line in spiked.log.getvalue().splitlines() if "spike" in line)
    assert "spike at step 29" in line and "back to step 24" in line
    assert f"samples {spiked.seen[28][0]}, " in line
    losses = [record["masked_lm_loss"] for record in records if "masked_lm_loss" in record]
    assert losses[-1] < found[0]["spike"]["usual_loss"]


def test_what_is_left_is_a_run_that_never_took_those_batches(spiked, tmp_path):
    other = Run(tmp_path / "run", guarded=False, bursts=())
    other.go(leave_out=range(24, 31))
    assert same(spiked, other)
    assert spiked.state.tokens == other.state.tokens


def test_without_a_guard_the_burst_ruins_the_run(spiked, tmp_path):
    other = Run(tmp_path / "run", guarded=False)
    other.go()
    last = read_metrics(tmp_path / "run")[-1]["masked_lm_loss"]
    assert last > 1.5 * read_metrics(spiked.folder)[-1]["masked_lm_loss"]


# in the burst, while the spike's values are on their way, around the roll-back
@pytest.mark.parametrize("stops", [(29,), (23, 30, 31)])
def test_a_stopped_run_goes_back_alike(spiked, stops, tmp_path):
    for stop in stops:
        stopped = Run(tmp_path / "run", resume=(tmp_path / "run").exists())
        assert stopped.go(stop_before=stop) is False
    run = Run(tmp_path / "run", resume=True)
    assert run.state.groups == stops[-1] + 1
    assert run.go() is True
    assert same(spiked, run)
    clocks = [dataclasses.replace(r.state, seconds=0.0) for r in (spiked, run)]
    assert clocks[0] == clocks[1]
    found = [r["spike"] for r in read_metrics(tmp_path / "run") if "spike" in r]
    assert found == [r["spike"] for r in read_metrics(spiked.folder) if "spike" in r]


def test_a_spike_in_the_last_step_is_not_left_in_the_weights(tmp_path):
    run = Run(tmp_path / "run", bursts=(27,), steps=29)
    assert run.go() is True
    assert run.state.rollbacks == [{"from_step": 25, "to_step": 29}] and run.state.step == 29


def test_a_level_that_stays_high_is_taken_for_the_new_one(tmp_path):
    # every step from the burst on is bad: no batches to leave out would help
    run = Run(tmp_path / "run", bursts=range(27, 1000))
    assert run.go() is True
    assert len(run.state.rollbacks) == module.MOST_ROLLBACKS
    assert {span["from_step"] for span in run.state.rollbacks} == {25}


def test_an_even_run_is_left_alone(tmp_path):
    run, plain = Run(tmp_path / "a", bursts=()), Run(tmp_path / "b", bursts=(), guarded=False)
    run.go()
    plain.go()
    assert run.state.rollbacks == [] and same(run, plain)


def test_the_running_level_begins_as_mean_and_variance():
    values = np.random.default_rng(0).normal(3.0, 0.5, 40).tolist()
    level = Level()
    for value in values:
        level.add(value)
    eps = 64 * np.finfo(float).eps
    assert abs(level.mean - statistics.fmean(values)) <= eps * 3
    assert abs(level.variance - statistics.pvariance(values)) <= eps
    expected = (5.0 - level.mean) / math.sqrt(level.variance)
    assert level.deviations(5.0, 1e-9) == expected
    assert level.deviations(5.0, 10.0) == (5.0 - level.mean) / 10.0


def test_nothing_is_judged_by_few_values():
    level = Level()
    for value in (1.0,) * (module.FEWEST - 1):
        level.add(value)
    assert level.deviations(100.0, 0.01) == 0.0
    level.add(1.0)
    assert level.deviations(100.0, 0.01) == 9900.0


def test_steps_that_changed_nothing_are_not_judged():
    figures = [
        Figures(1, torch.tensor([math.nan, 1.0, 0.0]), []),
        Figures(2, torch.tensor([1.0, math.inf, 0.0]), []),
        Figures(3, torch.tensor([1.0, 1.0, 1.0]), []),
    ]
    assert [one.read()[2] for one in figures] == [False] * 3
    assert Figures(4, torch.tensor([1.0, 1.0, 0.0]), []).read() == (1.0, 1.0, True)
    guard = SpikeGuard(torch.nn.Linear(1, 1), None, 8.0, EVERY)
    for one in figures:
        assert guard._judge(one) is None
    assert guard.levels == Levels()


def test_unread_values_travel_through_json():
    values = torch.tensor([0.1, math.nan, 1.0])
    again = Figures.of(json.loads(json.dumps(Figures(7, values, [3, 4]).raw())))
    assert again.step == 7 and again.samples == [3, 4]
    assert torch.equal(again._values.isnan(), values.isnan()) and again._values[0] == values[0]
