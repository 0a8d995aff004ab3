"""A running mean of the weights: by its formula, across a stop, and in what is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import stirred, tiny_config, tiny_examples

from fastbert.models import BertForMaskedLM
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import TrainingStep
from fastbert.training.weight_average import WeightAverage


class Run:
    def __init__(self, seed: int = 0, decay: float = 0.5):
        self.model = stirred(BertForMaskedLM.from_config(tiny_config(), seed), seed)
        self.optimizers = Optimizers(self.model, "adamw", learning_rate=1e-2)
        self.optimizers.average = WeightAverage(self.model, decay)
        self.step = TrainingStep(self.model, self.optimizers, torch.float32, 1.0)

    def go(self, number: int):
        return self.step([tiny_examples([9, 20], seed=number).batch([0, 1])], None, 1.0)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def test_the_mean_is_what_its_formula_says():
    rule = ErrorRule()
    for seed in SEEDS:
        run = Run(seed)
        exact = {name: value.double() for name, value in run.weights().items()}
        plain = run.weights()
        for number in range(8):
            run.go(number)
            # 2/11, 3/12, ... until a half
            decay = min(0.5, (2 + number) / (11 + number))
            for name, value in run.weights().items():
                exact[name] = decay * exact[name] + (1 - decay) * value.double()
                plain[name] = decay * plain[name] + (1 - decay) * value
        for name, value in run.optimizers.average.weights.items():
            rule.compare(name, value, plain[name], exact[name])
    rule.assert_within()


def test_a_step_that_changes_nothing_leaves_the_mean():
    run = Run()
    run.go(0)
    before = copy.deepcopy(run.optimizers.average.state_tensors())
    hook = run.model.masked_lm.norm.bias.register_hook(lambda gradient: gradient / 0.0)
    assert run.go(1).sums["skipped"] == 1
    hook.remove()
    after = run.optimizers.average.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run.go(1)
    assert not torch.equal(before["masked_lm.bias"], after["masked_lm.bias"])


def test_the_mean_is_part_of_the_state():
    run, other = Run(), Run(1)
    for number in range(3):
        run.go(number)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizers.load_state_tensors(copy.deepcopy(run.optimizers.state_tensors()))
    for one in (run, other):
        one.go(3)
    ours, theirs = (one.optimizers.state_tensors() for one in (run, other))
    assert ours.keys() == theirs.keys() and "average:masked_lm.bias" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_foreign_mean_is_refused():
    average = Run().optimizers.average
    tensors = dict(average.state_tensors())
    with pytest.raises(ValueError, match="average: count is on one side alone"):
        average.load_state_tensors({n: t for n, t in tensors.items() if n != "count"})
    with pytest.raises(ValueError, match=r"masked_lm.bias has shape \[3\]"):
        average.load_state_tensors({**tensors, "masked_lm.bias": torch.zeros(3)})


def test_inside_the_model_has_the_mean_and_after_it_its_own():
    run = Run()
    for number in range(3):
        run.go(number)
    own = run.weights()
    with pytest.raises(RuntimeError), run.optimizers.average.applied():
        mean = run.weights()
        raise RuntimeError
    assert all(torch.equal(mean[n], w) for n, w in run.optimizers.average.weights.items())
    assert not torch.equal(mean["masked_lm.bias"], own["masked_lm.bias"])
    assert all(torch.equal(own[name], value) for name, value in run.weights().items())
