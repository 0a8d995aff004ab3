"""The last layer computes the rows that losses read: nothing else changes."""

from __future__ import annotations

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred, tiny_config, tiny_examples

from fastbert import encoder
from fastbert.kernels.ops import Rng
from fastbert.models import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from fastbert.packing import Capacity

HEADS = [BertForMaskedLM, BertForPreTraining, BertForSequenceClassification]
LENGTHS = [12, 30, 1, 17]


def batch_of(architecture, seed: int, *, sample_ids: bool):
    masked = architecture is not BertForSequenceClassification
    examples = tiny_examples(LENGTHS, seed=seed, masked=masked)
    if sample_ids:
        examples.sample_ids = torch.arange(100, 104).numpy()
    return examples.batch(range(len(LENGTHS)), Capacity(70, 6, 12))


def results(architecture, seed: int, dtype: torch.dtype, *, sample_ids: bool = True):
    model = stirred(architecture.from_config(tiny_config(), seed), seed).to(dtype)
    # exact masks belong to the row, whichever rows are computed
    rng = Rng(seed, exact=True)
    output = model(batch_of(architecture, seed, sample_ids=sample_ids), rng=rng)
    output.loss.backward()
    return {"loss": output.loss.detach()} | gradients(model)


@pytest.mark.parametrize("sample_ids", [True, False])
@pytest.mark.parametrize("architecture", HEADS)
def test_loss_and_gradients_are_those_of_the_whole_layer(architecture, sample_ids, monkeypatch):
    rule = ErrorRule()
    for seed in SEEDS:
        ours = results(architecture, seed, torch.float32, sample_ids=sample_ids)
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "MOST_SELECTED", 0.0)
            whole, oracle = (
                results(architecture, seed, dtype, sample_ids=sample_ids)
                for dtype in (torch.float32, torch.float64)
            )
        assert ours.keys() == whole.keys() == oracle.keys()
        for name, truth in oracle.items():
            rule.compare(name, ours[name], whole[name], truth)
    rule.assert_within()


@pytest.mark.parametrize("architecture", HEADS)
def test_the_feed_forward_sees_those_rows_alone(architecture, monkeypatch):
    rows = []
    original = encoder.ops.feed_forward

    def seen(x, *rest, **options):
        rows.append(len(x))
        return original(x, *rest, **options)

    monkeypatch.setattr(encoder.ops, "feed_forward", seen)
    results(architecture, 0, torch.float32)
    read = {BertForMaskedLM: 12, BertForPreTraining: 12 + 6, BertForSequenceClassification: 6}
    assert rows == [70, read[architecture]]


def test_where_many_rows_are_read_the_layer_is_whole():
    model = BertForSequenceClassification.from_config(tiny_config())
    batch = tiny_examples([1, 1, 2], masked=False).batch([0, 1, 2])
    states, selected = model.encoder.selected(batch, None, first=True)
    assert len(states) == 4 and selected is batch


def test_without_labels_every_token_has_its_logits():
    model = BertForPreTraining.from_config(tiny_config())
    batch = batch_of(BertForPreTraining, 0, sample_ids=False)
    batch.labels = batch.sequence_labels = batch.masked_positions = None
    assert model(batch).logits.shape == (70, 67)
