from __future__ import annotations

import copy

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import tiny_config, tiny_examples
from torch import nn

from fastbert.models import BertForSequenceClassification
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.row_gradients import RowGradients, read_sparsely

LENGTHS = [9, 20, 31]


def model_of(seed: int = 0):
    return BertForSequenceClassification.from_config(tiny_config(), seed)


def backward(model, seed: int) -> None:
    batch = tiny_examples(LENGTHS, seed=seed).batch(range(len(LENGTHS)))
    model(batch).loss.backward()


def test_an_embedding_read_sparsely_gives_the_rows_it_read():
    dense, sparse = model_of(), model_of()
    read_sparsely(sparse, sparse.word_weight)
    for model in (dense, sparse):
        backward(model, 0)
    gradient = sparse.word_weight.grad
    assert gradient.is_sparse
    ids = tiny_examples(LENGTHS, seed=0).batch(range(3)).input_ids
    assert set(gradient.coalesce().indices()[0].tolist()) <= set(ids.tolist())
    assert torch.equal(gradient.to_dense() != 0.0, dense.word_weight.grad != 0.0)
    others = [module for module in sparse.modules() if isinstance(module, nn.Embedding)]
    assert [module.sparse for module in others].count(True) == 1 < len(others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_dense_gradients(name):
    """Rows that a step has not read move too, by decay and by their moments."""
    rule = ErrorRule()
    for seed in SEEDS:
        results = []
        for sparse, dtype in (
            (True, torch.float32),
            (False, torch.float32),
            (False, torch.float64),
        ):
            model = model_of(seed).to(dtype)
            if sparse:
                read_sparsely(model, model.word_weight)
            optimizers = Optimizers(model, name, learning_rate=1e-3, muon_learning_rate=2e-3)
            before = model.word_weight.detach().clone()
            for step in range(3):
                # two micro-batches
                backward(model, 10 * seed + step)
                backward(model, 10 * seed + step + 5)
                assert model.word_weight.grad.is_sparse == sparse
                update = optimizers.step(1.0, clip_norm=0.5)
                assert all(parameter.grad is None for parameter in model.parameters())
            results.append((model.word_weight.detach() - before, update.gradient_norm))
        for which, *values in zip(("change", "norm"), *results, strict=True):
            rule.compare(which, *values)
    rule.assert_within()


def test_the_table_is_zero_between_updates_and_kept():
    weight = nn.Parameter(torch.zeros(6, 2))
    rows = RowGradients()
    kept = None
    for ids in ([1, 4, 1], [0, 4, 5]):
        weight.grad = torch.sparse_coo_tensor(
            torch.tensor([ids]), torch.arange(6.0).view(3, 2) + 1.0, (6, 2), check_invariants=True
        )
        expected = weight.grad.to_dense()
        (held,) = rows.spread([weight])
        assert torch.equal(weight.grad, expected)
        assert torch.equal(held.norm(), expected.norm())
        assert kept is None or weight.grad is kept
        kept = weight.grad
        rows.clear()
        assert (kept == 0.0).all()


def test_dense_and_missing_gradients_are_left_alone():
    dense, missing = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    dense.grad = torch.full((3,), 2.0)
    gradient = dense.grad
    rows = RowGradients()
    assert rows.spread([dense, missing]) == [gradient]
    rows.clear()
    assert dense.grad is gradient and torch.equal(gradient, torch.full((3,), 2.0))
    assert missing.grad is None


def test_a_copy_of_the_model_reads_as_its_original():
    model = model_of()
    read_sparsely(model, model.word_weight)
    again = copy.deepcopy(model)
    backward(again, 0)
    assert again.word_weight.grad.is_sparse
