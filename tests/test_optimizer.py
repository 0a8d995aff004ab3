from __future__ import annotations

import pytest
import torch
from tiny import gradients, tiny_config, tiny_examples

from fastbert.errors import InputError
from fastbert.models import BertForPreTraining, BertForSequenceClassification
from fastbert.training.optimizer import OPTIMIZERS, Optimizers

RATES = {"learning_rate": 1e-3, "muon_learning_rate": 2e-3}


def model_of(architecture=BertForPreTraining, seed: int = 0):
    return architecture.from_config(tiny_config(), seed)


def groups_of(optimizers: Optimizers) -> dict[str, tuple[str, float]]:
    """Each parameter's optimiser and weight decay; fails on one in two groups."""
    found = {}
    for optimizer in optimizers.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = optimizers.names[parameter]
                assert name not in found
                found[name] = (type(optimizer).__name__, group["weight_decay"])
    return found


def step(model, optimizers: Optimizers, seed: int = 0, factor: float = 1.0) -> None:
    lengths = [9, 20]
    model(tiny_examples(lengths, seed=seed).batch(range(len(lengths)))).loss.backward()
    optimizers.step(factor)


@pytest.mark.parametrize("architecture", [BertForPreTraining, BertForSequenceClassification])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_once_and_decay_where_it_belongs(name, architecture):
    model = model_of(architecture)
    groups = groups_of(Optimizers(model, name, weight_decay=0.07, **RATES))
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for parameter, (_, decay) in groups.items():
        without = parameter.endswith(".bias") or "norm" in parameter
        assert decay == (0.0 if without else 0.07), parameter


def test_muon_moves_the_matrices_between_hidden_states_alone():
    groups = groups_of(Optimizers(model_of(), "muon", **RATES))
    by_muon = {name for name, (optimizer, _) in groups.items() if optimizer == "Muon"}
    parts = ("qkv", "attention_output", "intermediate", "output")
    assert by_muon == {
        *(f"encoder.layers.{layer}.{part}.weight" for layer in range(2) for part in parts),
        "pooler.dense.weight",
        "masked_lm.dense.weight",
    }
    assert {o for o, _ in groups_of(Optimizers(model_of(), "adamw", **RATES)).values()} == {"AdamW"}


def test_a_parameter_in_two_groups_is_noticed():
    model = model_of()
    optimizers = Optimizers(model, "adamw", **RATES)
    optimizers.optimizers[0].param_groups[1]["params"].append(model.next_sentence.weight)
    with pytest.raises(AssertionError, match="in two groups"):
        optimizers._assert_covered(model)


def test_a_parameter_in_no_group_is_noticed():
    model = model_of()
    optimizers = Optimizers(model, "adamw", **RATES)
    model.late = torch.nn.Linear(3, 3)
    with pytest.raises(AssertionError, match="in no group"):
        optimizers._assert_covered(model)


def test_an_unknown_name():
    with pytest.raises(
        InputError, match="optimizer must be one of adamw, muon, lamb, stable-adamw, got 'sgd'"
    ):
        Optimizers(model_of(), "sgd", **RATES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_moves_every_parameter_and_drops_the_gradients(name):
    model = model_of()
    optimizers = Optimizers(model, name, **RATES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizers)
    assert gradients(model) == {}
    for parameter, value in model.named_parameters():
        assert not torch.equal(value, before[parameter]), parameter


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_scales_both_peaks_and_zero_stands_still(name):
    model = model_of()
    optimizers = Optimizers(model, name, **RATES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, optimizers, factor=0.0)
    assert optimizers.learning_rate() == 0.0
    for parameter, value in model.named_parameters():
        assert torch.equal(value, before[parameter]), parameter
    for factor in (0.5, 0.25, 0.5):
        step(model, optimizers, factor=factor)
        rates = [g["lr"] for o in optimizers.optimizers for g in o.param_groups]
        expected = [1e-3 * factor] * 2 + [2e-3 * factor] * (name == "muon")
        # they lie beside the parameters, in fp32
        assert torch.equal(torch.stack(rates), torch.tensor(expected))
        assert optimizers.learning_rate() == 1e-3 * factor


def test_biases_and_norms_do_not_decay():
    """With a gradient of zero, decay is all that moves a parameter."""
    model = model_of()
    optimizers = Optimizers(model, "adamw", weight_decay=0.5, **RATES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(1.0)
    for name, value in model.named_parameters():
        changed = not torch.equal(value, before[name])
        assert changed == (value.ndim > 1), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_restored_bit_for_bit(name):
    first, second = model_of(), model_of()
    optimizers = Optimizers(first, name, **RATES)
    for seed in range(3):
        step(first, optimizers, seed)
    tensors = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    second.load_state_dict(first.state_dict())
    restored = Optimizers(second, name, **RATES)
    restored.load_state_tensors(tensors)
    for seed in range(3, 5):
        step(first, optimizers, seed)
        step(second, restored, seed)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    for key, value in optimizers.state_tensors().items():
        assert torch.equal(value, restored.state_tensors()[key]), key


def test_state_tensors_name_parameters():
    model = model_of()
    optimizers = Optimizers(model, "muon", **RATES)
    assert optimizers.state_tensors() == {}
    step(model, optimizers)
    names = {key.rpartition("/")[0] for key in optimizers.state_tensors()}
    assert names == {name for name, _ in model.named_parameters()}


def test_state_that_does_not_fit_is_refused():
    model = model_of()
    optimizers = Optimizers(model, "adamw", **RATES)
    step(model, optimizers)
    tensors = optimizers.state_tensors()
    fresh = Optimizers(model_of(), "adamw", **RATES)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        fresh.load_state_tensors(tensors | {"encoder.elsewhere/exp_avg": torch.zeros(1)})
    name = next(key for key in tensors if key.endswith("/exp_avg"))
    with pytest.raises(ValueError, match="shape"):
        fresh.load_state_tensors(tensors | {name: torch.zeros(2)})


def test_a_head_without_loss_has_no_state_and_stands_still():
    model = model_of()
    optimizers = Optimizers(model, "adamw", **RATES)
    before = model.next_sentence.weight.detach().clone()
    batch = tiny_examples([9, 20]).batch([0, 1])
    batch.sequence_labels = None
    model(batch).loss.backward()
    optimizers.step(1.0)
    assert torch.equal(before, model.next_sentence.weight)
    restored = Optimizers(model, "adamw", **RATES)
    restored.load_state_tensors(optimizers.state_tensors())
    assert restored.state_tensors().keys() == optimizers.state_tensors().keys()
