from __future__ import annotations

import math

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import tiny_config, tiny_examples
from torch import nn

from fastbert.models import BertForSequenceClassification
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.row_gradients import (
    MOST_READ,
    RowGradients,
    embeddings_of,
    read_sparsely,
)

LENGTHS = [9, 20, 31]


def model_of(seed: int = 0):
    return BertForSequenceClassification.from_config(tiny_config(), seed)


def backward(model, seed: int) -> None:
    batch = tiny_examples(LENGTHS, seed=seed).batch(range(len(LENGTHS)))
    model(batch).loss.backward()


def test_an_embedding_read_sparsely_gives_the_rows_it_read():
    dense, sparse = model_of(), model_of()
    backward(dense, 0)
    words = embeddings_of(sparse, sparse.word_weight)
    with read_sparsely(words, tokens=0):
        backward(sparse, 0)
    gradient = sparse.word_weight.grad
    assert gradient.is_sparse
    ids = tiny_examples(LENGTHS, seed=0).batch(range(3)).input_ids
    assert set(gradient.coalesce().indices()[0].tolist()) <= set(ids.tolist())
    assert torch.equal(gradient.to_dense() != 0.0, dense.word_weight.grad != 0.0)
    others = [module for module in sparse.modules() if isinstance(module, nn.Embedding)]
    assert len(words) == 1 < len(others)
    # whoever trains the model himself afterwards finds it as it was
    assert not any(module.sparse for module in others)


def test_a_step_of_many_tokens_gives_a_dense_gradient():
    model = model_of()
    words = embeddings_of(model, model.word_weight)
    few = int(words[0].num_embeddings * MOST_READ)
    for tokens, sparse in ((few, True), (few + 1, False)):
        with read_sparsely(words, tokens):
            assert words[0].sparse == sparse
        assert not words[0].sparse


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
            words = embeddings_of(model, model.word_weight) if sparse else []
            optimizers = Optimizers(model, name, learning_rate=1e-3, muon_learning_rate=2e-3)
            before = model.word_weight.detach().clone()
            for step in range(3):
                # two micro-batches
                with read_sparsely(words, tokens=0):
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_are_not_finite_change_nothing_and_leave_the_table_clean(name):
    model = model_of()
    optimizers = Optimizers(model, name, learning_rate=1e-3, muon_learning_rate=2e-3)
    words = embeddings_of(model, model.word_weight)
    for factor in (1.0, math.nan, 1.0):
        with read_sparsely(words, tokens=0):
            backward(model, 0)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        before = model.word_weight.detach().clone()
        update = optimizers.step(1.0, clip_norm=1.0)
        assert bool(update.skipped) == math.isnan(factor)
        assert torch.equal(model.word_weight, before) == math.isnan(factor)
        assert model.word_weight.isfinite().all()


def test_an_update_that_was_cut_short_leaves_nothing_behind():
    weight = nn.Parameter(torch.zeros(4, 1))
    rows = RowGradients()
    for row in (0, 3):
        weight.grad = torch.sparse_coo_tensor(
            torch.tensor([[row]]), torch.ones(1, 1), (4, 1), check_invariants=True
        )
        rows.spread([weight])
    assert weight.grad.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]
