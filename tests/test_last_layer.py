"""The last layer computes the rows that losses read: nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred, tiny_config, tiny_examples
from torch import nn

from fastbert import encoder, linear
from fastbert.kernels.ops import Rng
from fastbert.linear import is_plain
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


# rotary positions, windows, and norms in front; heads of an even width
MODERN = {"model_type": "modernbert", "hidden_size": 24, "extra": {"local_attention": 12}}


def results(
    architecture,
    seed: int,
    dtype: torch.dtype,
    *,
    sample_ids: bool = True,
    hook: bool = False,
    **fields,
):
    model = stirred(architecture.from_config(tiny_config(**fields), seed), seed).to(dtype)
    if hook:
        # what an adapter does: its module has a say in the projection
        qkv = model.encoder.layers[-1].qkv
        qkv.register_forward_hook(lambda module, inputs, output: output * 1.5)
        assert not is_plain(qkv)
    # exact masks belong to the row, whichever rows are computed
    rng = Rng(seed, exact=True)
    output = model(batch_of(architecture, seed, sample_ids=sample_ids), rng=rng)
    output.loss.backward()
    return {"loss": output.loss.detach()} | gradients(model)


@pytest.mark.parametrize("sample_ids", [True, False])
@pytest.mark.parametrize("architecture", HEADS)
def test_loss_and_gradients_are_those_of_the_whole_layer(architecture, sample_ids, monkeypatch):
    check(monkeypatch, architecture, sample_ids=sample_ids)


@pytest.mark.parametrize("architecture", [BertForMaskedLM, BertForSequenceClassification])
def test_rotary_positions_windows_and_norms_in_front(architecture, monkeypatch):
    check(monkeypatch, architecture, **MODERN)


def test_a_projection_with_an_adapter_is_called_whole(monkeypatch):
    check(monkeypatch, BertForMaskedLM, hook=True)


def check(monkeypatch, architecture, **options) -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        ours = results(architecture, seed, torch.float32, **options)
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "MOST_SELECTED", 0.0)
            whole, oracle = (
                results(architecture, seed, dtype, **options)
                for dtype in (torch.float32, torch.float64)
            )
        assert ours.keys() == whole.keys() == oracle.keys()
        for name, truth in oracle.items():
            rule.compare(name, ours[name], whole[name], truth)
    rule.assert_within()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("architecture", HEADS)
def test_query_and_feed_forward_see_those_rows_alone(architecture, family, monkeypatch):
    if family == "modernbert" and architecture is BertForPreTraining:
        pytest.skip("no such model of the family")
    seen: dict[str, list[int]] = {"fed": [], "asked": []}

    def watch(name, record):
        original = getattr(encoder.ops, name)

        def watched(*arguments, **options):
            record(*arguments)
            return original(*arguments, **options)

        monkeypatch.setattr(encoder.ops, name, watched)

    def fed(x, *rest):
        seen["fed"].append(len(x))

    def asked(qkv, *rest):
        seen["asked"].append(int((qkv[:, 0] != 0.0).flatten(1).any(dim=1).sum()))

    watch("feed_forward" if family == "bert" else "gated_feed_forward", fed)
    watch("fused_qkv_attention", asked)
    results(architecture, 0, torch.float32, **(MODERN if family == "modernbert" else {}))
    read = {BertForMaskedLM: 12, BertForPreTraining: 12 + 6, BertForSequenceClassification: 6}
    # free slots and empty sequences point to rows that others read as well, or to the tail
    batch = batch_of(architecture, 0, sample_ids=True)
    parts = {
        BertForMaskedLM: [batch.masked_positions],
        BertForPreTraining: [batch.masked_positions, batch.first_tokens],
        BertForSequenceClassification: [batch.first_tokens],
    }[architecture]
    assert seen["fed"] == [70, read[architecture]]
    assert seen["asked"] == [70, len(torch.cat(parts).unique())]


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


def of_product(x, inner, outer, gated):
    return outer(x)


def of_feed_forward(x, inner, outer, gated):
    return outer(F.gelu(inner(x)))


def of_gated_feed_forward(x, inner, outer, gated):
    activated, gate = gated(x).chunk(2, dim=-1)
    return outer(F.gelu(activated) * gate)


@pytest.mark.parametrize(
    "definition, call",
    [
        (of_product, lambda x, inner, outer, gated: linear.product(outer, x)),
        (
            of_feed_forward,
            lambda x, inner, outer, gated: linear.feed_forward(inner, outer, x, "gelu"),
        ),
        (
            of_gated_feed_forward,
            lambda x, inner, outer, gated: linear.gated_feed_forward(gated, outer, x, "gelu"),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_waits_for_the_norm_under_gradients(dtype, definition, call):
    """Where there are none the product adds it: rounded once more, but in no pass of its own."""
    rule = ErrorRule()
    for seed in SEEDS:
        torch.manual_seed(seed)
        values = [torch.randn(33, 24), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 48)]
        values = [value.to(dtype) for value in values]
        bias = values[2].bias
        product, waiting = call(*values)
        assert waiting is bias
        with torch.no_grad():
            whole, waiting = call(*values)
            plain = definition(*values)
            oracle = definition(*(copy.deepcopy(value).double() for value in values))
        assert waiting is None
        rule.compare("without gradients", whole, plain, oracle)
        rule.compare("under gradients", (product + bias).detach(), plain, oracle)
    rule.assert_within()
