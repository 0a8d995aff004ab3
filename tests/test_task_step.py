"""Every task's step captured: the eager one bit for bit, whatever the number of tokens."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from simulated_graph import SimulatedGraph
from simulated_graph import as_on_a_device as as_on_a_device
from test_tasks import CASES, Case
from test_tasks import start as start
from tiny import tiny_tokenizer
from torch import nn

from fastbert.data.epochs import EpochStream
from fastbert.data.stream import Position
from fastbert.encoder import Encoder
from fastbert.tasks.losses import Shaping
from fastbert.tasks.registry import make_task
from fastbert.tasks.units import TaskBatch
from fastbert.training import row_gradients
from fastbert.training.loop import LoopConfig
from fastbert.training.methods import class_weights
from fastbert.training.optimizer import Optimizers
from fastbert.training.schedule import Budget
from fastbert.training.step import WARM_STEPS, CapturedStep
from fastbert.training.task_step import task_step

WINDOWS = [
    dataclasses.replace(CASES[0], figure=how, options=(("long_text", how),))
    for how in ("mean", "max")
]
LOOP = LoopConfig(Budget(max_steps=1), dtype="fp32", dropout=False)


def of_one_shape(units, count: int) -> list[TaskBatch]:
    """Batches that can take each other's place in a graph: ever more tokens, at last the fewest."""
    stream = EpochStream(units, 8, seed=1, fixed_shapes=True)
    found: dict[object, dict[int, TaskBatch]] = {}
    for epoch in itertools.count():
        for batch, _ in stream.epoch_batches(Position(epoch)):
            alike = found.setdefault(batch.shapes(), {})
            alike[batch.num_tokens] = batch
            if len(alike) == count:
                ordered = [alike[tokens] for tokens in sorted(alike)]
                return [*ordered[1:], ordered[0]]
    raise AssertionError("unreachable")


def looked_up(self, batch, rng=None, rows=None):
    """Embeddings alone: the reference path plans its attention on the host."""
    states = self.embeddings.word_embeddings(batch.input_ids)
    return states if rows is None else states[rows]


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("case", [*CASES, *WINDOWS], ids=lambda case: f"{case.task}-{case.figure}")
def test_a_captured_step_of_a_task_is_the_eager_one(
    case: Case, shaped: bool, start: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Encoder, "forward", looked_up)
    task = make_task(case.task, **dict(case.options))
    rows = task.read(case.write(tmp_path / "train", 120, np.random.default_rng(0)), lambda _: None)
    task.fit(rows, "rows")
    task.max_seq_len = 12 if case in WINDOWS else 32
    model, _ = task.load(start, dropout=0.0)
    units = task.build(task.examples(rows, "rows", lambda _: None), tiny_tokenizer())
    batches = of_one_shape(units, WARM_STEPS + 3)
    counts = task.class_counts(units) if shaped else None
    weights = None if counts is None else class_weights("balanced", counts)
    shaping = Shaping(weights, 0.1) if shaped else Shaping()
    steps = []
    for own in (model, copy.deepcopy(model)):
        optimizers = Optimizers(own, "adamw", learning_rate=1e-2)
        steps.append(task_step(task, own, optimizers, LOOP, shaping, 0.0))
    eager, step = steps
    graph = CapturedStep(step, SimulatedGraph)
    for number, batch in enumerate(batches):
        moving = step.optimizers.state_tensors().values()
        SimulatedGraph.kept = [*step.model.parameters(), *moving]
        results = [run([copy.deepcopy(batch)], None, 1.0) for run in (eager, graph)]
        for name, value in results[0].sums.items():
            assert torch.equal(value, results[1].sums[name]), (number, name)
        weights = eager.model.state_dict()
        for name, value in step.model.state_dict().items():
            assert torch.equal(value, weights[name]), (number, name)
    assert (graph.eager, graph.replayed) == (WARM_STEPS, 3)


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_word_embeddings_are_read_sparsely_unless_a_step_attacks(
    adversarial: float, start: Path, tmp_path: Path, monkeypatch
) -> None:
    case = CASES[0]
    task = make_task(case.task, **dict(case.options))
    rows = task.read(case.write(tmp_path / "train", 20, np.random.default_rng(0)), lambda _: None)
    task.fit(rows, "rows")
    model, _ = task.load(start, dropout=0.0)
    units = task.build(task.examples(rows, "rows", lambda _: None), tiny_tokenizer())
    optimizers = Optimizers(model, "adamw", learning_rate=1e-2)
    step = task_step(task, model, optimizers, LOOP, Shaping(), adversarial)
    seen, update = [], optimizers.update

    def watched(clip_norm):
        seen.append(model.word_weight.grad.is_sparse)
        return update(clip_norm)

    monkeypatch.setattr(optimizers, "update", watched)
    for most_read in (1e9, 0.0):
        monkeypatch.setattr(row_gradients, "MOST_READ", most_read)
        batch, _ = next(EpochStream(units, 8, seed=1).epoch_batches(Position()))
        step([batch], None, 1.0)
    assert seen == [not adversarial, False]
    # whoever trains the model himself afterwards finds it as it was
    assert not any(m.sparse for m in model.modules() if isinstance(m, nn.Embedding))
