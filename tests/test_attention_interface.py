"""transformers' layers as they are, with our attention."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from families import padded_batch, their_model
from oracle import ErrorRule

import fastbert
from fastbert import attention_interface
from fastbert.attention_interface import attend, plan
from fastbert.families import FAMILIES


@pytest.mark.parametrize("family", list(FAMILIES))
def test_padding_is_not_attended_to(family, monkeypatch):
    called = []
    own = attention_interface.ops.attention

    def noted(*arguments, **options):
        called.append(options["window"])
        return own(*arguments, **options)

    monkeypatch.setattr(attention_interface.ops, "attention", noted)
    name = fastbert.register_attention()
    stock = their_model(family, "BertModel")
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation(name)
    if ours.config._attn_implementation != name:
        # this release lets the family choose among its own
        pytest.skip(f"transformers keeps {family} from other implementations")
    batch, rule = padded_batch(family, "BertModel", 0), ErrorRule()
    real = batch["attention_mask"] != 0
    with torch.no_grad():
        found = ours(**batch).last_hidden_state[real]
        layers = ours.config.num_hidden_layers
        assert len(called) == layers and len(set(called)) == (2 if family == "modernbert" else 1)
        baseline = stock(**batch).last_hidden_state[real]
        oracle = stock.double()(**batch).last_hidden_state[real]
        rule.compare("states", found, baseline, oracle)
        rule.assert_within(1)
        whole = ours(batch["input_ids"]).last_hidden_state
    assert whole.isfinite().all()


def test_masks_that_are_no_encoder_s_are_refused():
    masks = importlib.import_module("transformers.masking_utils")
    both_ways = masks.bidirectional_mask_function
    mask = torch.ones(2, 5, dtype=torch.long)
    assert not plan(attention_mask=mask, mask_function=both_ways).windowed
    for function, name in (
        (masks.causal_mask_function, "causal_mask_function"),
        (masks.or_masks(both_ways, masks.causal_mask_function), "or_masks"),
        (masks.and_masks(both_ways, masks.causal_mask_function), "causal_mask_function"),
        (masks.sliding_window_causal_mask_function(3), "sliding_window_overlay"),
    ):
        with pytest.raises(ValueError, match=f"masks are full, or windows both ways, got {name}"):
            plan(attention_mask=mask, mask_function=function)
    mask[0, 2] = 0
    plan(attention_mask=mask, mask_function=both_ways)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padding before a sequence's first token"):
        plan(attention_mask=mask, mask_function=both_ways)


def test_windows_are_the_mask_s_and_the_call_s():
    masks = importlib.import_module("transformers.masking_utils")
    if not hasattr(masks, "sliding_window_bidirectional_mask_function"):
        pytest.skip("this transformers has no windows both ways")
    mask = torch.ones(2, 5, dtype=torch.long)
    window = masks.sliding_window_bidirectional_mask_function(3)
    packed = plan(attention_mask=mask, mask_function=window)
    assert packed.windowed
    states = torch.zeros(2, 1, 5, 32)
    with pytest.raises(ValueError, match=r"must both be of a window, or neither, got .* None"):
        attend(torch.nn.Linear(1, 1), states, states, states, packed)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="padding between a sequence's token"):
        plan(attention_mask=mask, mask_function=window)


def test_calls_that_are_no_encoder_s_are_refused():
    states = torch.zeros(2, 1, 5, 32)
    with pytest.raises(ValueError, match=r"must be \[batch, length\], got \[2, 1, 5, 5\]"):
        attend(torch.nn.Linear(1, 1), states, states, states, torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="only encoders without cache"):
        attend(torch.nn.Linear(1, 1), states, states[:, :, :3], states[:, :, :3], None)
    causal = torch.nn.Linear(1, 1)
    causal.is_causal = True
    with pytest.raises(ValueError, match="only encoders without cache"):
        attend(causal, states, states, states, None)
