"""Every model of every family: transformers' own random weights, read, computed and given back."""

from __future__ import annotations

import copy
import json

import pytest
import support_table
import torch
from families import (
    CASES,
    compare_all,
    labels_for,
    named_as_ours,
    our_class,
    our_results,
    packed_batch,
    padded_batch,
    their_config,
    their_model,
    their_results,
    transformers,
)
from oracle import SEEDS, ErrorRule

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.families import FAMILIES, head_of
from fastbert.models import BertForMaskedLM, BertForPreTraining, BertModel
from fastbert.pre_norm import PreNormSettings, RotaryTables

OTHERS = [family for family in FAMILIES if family != "bert"]


def saved_and_read(family, name, folder, seed=0):
    theirs = their_model(family, name, seed)
    theirs.save_pretrained(folder)
    ours = our_class(name).from_pretrained(folder)
    assert ours.fresh_parameters == [] and not ours.training
    return theirs, ours


@pytest.mark.parametrize("family, name", CASES)
def test_files_go_both_ways_bit_for_bit(family, name, tmp_path):
    theirs, ours = saved_and_read(family, name, tmp_path / "theirs")
    found = named_as_ours(theirs.state_dict(), ours)
    assert found.keys() == ours.state_dict().keys()
    for key, tensor in ours.state_dict().items():
        assert torch.equal(found[key], tensor), key
    ours.save_pretrained(tmp_path / "ours")
    again, info = getattr(transformers, head_of(family, name).architecture).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    # and a reader of the saved folder learns what the first one said
    before, after = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "ours")
    )
    for key in before.keys() - {"transformers_version", "id2label", "label2id", "position_ids"}:
        assert after.get(key) == before[key], key


@pytest.mark.parametrize("family, name", CASES)
def test_values_and_gradients_are_those_of_transformers(family, name):
    rules = {"padded": ErrorRule(), "packed": ErrorRule()}
    for seed in SEEDS:
        theirs = their_model(family, name, seed)
        ours = our_class(name)(EncoderConfig.from_dict(theirs.config.to_dict())).eval()
        ours.load_state_dict(named_as_ours(theirs.state_dict(), ours))
        oracle = copy.deepcopy(theirs).double()
        batch = padded_batch(family, name, seed)
        labels = labels_for(name, batch, seed)
        expected = [
            their_results(model, ours, family, batch, labels, seed) for model in (theirs, oracle)
        ]
        for layout, ours_batch in (
            ("padded", batch),
            ("packed", packed_batch(name, batch, labels)),
        ):
            found = our_results(ours, ours_batch, labels, seed)
            compare_all(rules[layout], found, *expected, where=layout)
    for rule in rules.values():
        rule.assert_within()


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_made_here_is_read_by_transformers(family, tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    config = EncoderConfig(model_type=family, num_hidden_layers=2, **shape)
    ours = BertForMaskedLM.from_config(config)
    ours.save_pretrained(tmp_path)
    assert EncoderConfig.from_pretrained(tmp_path) == config
    architecture = head_of(family, "BertForMaskedLM").architecture
    _, info = getattr(transformers, architecture).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_positions_skip_padding_wherever_it_stands(family):
    """fairseq counts the tokens that are no padding, on whichever side they are."""
    theirs = their_model(family, "BertModel")
    ours = BertModel(EncoderConfig.from_dict(theirs.config.to_dict()))
    ours.load_state_dict(named_as_ours(theirs.state_dict(), ours))
    ids = torch.tensor([[3, 3, 7, 8, 9], [5, 3, 6, 7, 3], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    rule = ErrorRule()
    with torch.no_grad():
        found = ours.eval()(ids, mask).last_hidden_state[mask != 0]
        baseline = theirs(ids, mask).last_hidden_state[mask != 0]
        oracle = theirs.double()(ids, mask).last_hidden_state[mask != 0]
    rule.compare("states", found, baseline, oracle)
    rule.assert_within(1)
    assert ours.config.max_seqlen == 20 - 4


def test_one_segment_is_every_token_s():
    """A pair's segments mean nothing to a family that has none."""
    ours = BertModel.from_config(EncoderConfig.from_dict(their_config("roberta").to_dict())).eval()
    ids = torch.randint(4, 61, (2, 6))
    types = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    plain = ours(ids).last_hidden_state
    assert torch.equal(ours(ids, token_type_ids=types).last_hidden_state, plain)


def test_albert_s_groups_take_turns():
    config = EncoderConfig.from_dict(their_config("albert", num_hidden_layers=5).to_dict())
    model = BertModel.from_config(config)
    assert model.encoder.order == [0, 0, 0, 1, 1] and len(model.encoder.layers) == 2
    config.inner_group_num = 2
    assert BertModel.from_config(config).encoder.order == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize(
    "family, name, fields, message",
    [
        ("roberta", BertForPreTraining, {}, "not a model of family roberta, which has BertModel, "),
        ("roberta", BertModel, {"is_decoder": True}, "is_decoder is set: only encoders"),
        ("bert", BertModel, {"add_cross_attention": True}, "add_cross_attention is set"),
        (
            "electra",
            "BertForMultipleChoice",
            {"summary_type": "mean"},
            "summary_type must be 'first' for BertForMultipleChoice of family electra, got 'mean'",
        ),
        (
            "bert",
            BertModel,
            {"position_embedding_type": "relative_key_query"},
            "position_embedding_type must be absolute, got 'relative_key_query'",
        ),
        ("bert", BertModel, {"quantization_config": {"bits": 8}}, "quantization_config is set"),
        (
            "bert",
            BertModel,
            {"model_type": "t5"},
            "model_type must be one of bert, roberta, .*'t5'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(family, name, fields, message):
    cls = our_class(name) if isinstance(name, str) else name
    raw = their_config(family).to_dict() | fields
    with pytest.raises(InputError, match=message) as failure:
        cls.from_config(EncoderConfig.from_dict(raw))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("family", [name for name in OTHERS if name != "modernbert"])
def test_dropout_stands_where_the_family_has_it(family):
    """Expected drops of the residual stream, by what transformers' modules hold."""
    theirs = their_model(family, "BertModel", **_no_attention_dropout(family))
    config = EncoderConfig.from_dict(theirs.config.to_dict())
    assert config.family.attention_output_dropout == (family != "distilbert")
    assert config.family.output_dropout == (family != "albert")
    torch.manual_seed(0)
    calls = _dropout_calls(theirs.train(), torch.randint(4, 61, (2, 6)))
    layers = config.num_hidden_layers
    sites = config.family.attention_output_dropout + config.family.output_dropout
    assert calls == 1 + layers * sites


def _no_attention_dropout(family):
    name = "attention_dropout" if family == "distilbert" else "attention_probs_dropout_prob"
    hidden = "dropout" if family == "distilbert" else "hidden_dropout_prob"
    return {name: 0.0, hidden: 0.5}


def _dropout_calls(model, ids):
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_: calls.append(1))
    model(ids)
    return len(calls)


def test_the_readme_s_table_is_what_is_tested(root):
    cells = {(family, name, kind) for family, name in CASES for kind in ("own", "accelerated")}
    models = support_table.columns(FAMILIES.values())
    expected = support_table.table(cells, FAMILIES, models)
    found = support_table.within((root / "README.md").read_text(encoding="utf-8"))
    assert found == expected, "make support-table writes it anew"


def test_the_table_takes_tests_that_passed():
    class Report:
        when, outcome = "call", "passed"

    outcomes = support_table.Outcomes()
    test = support_table.TESTS["test_families.py"][0]
    for family, outcome in (("xlm-roberta", "passed"), ("bert", "failed")):
        Report.nodeid = f"tests/test_families.py::{test}[{family}-BertModel]"
        Report.outcome = outcome
        outcomes.pytest_runtest_logreport(Report)
    assert outcomes.passed == {("xlm-roberta", "BertModel", "own")}
    table = support_table.table(outcomes.passed, ["bert", "xlm-roberta"], ["BertModel"])
    assert table.splitlines()[2:] == ["| bert | - |", "| xlm-roberta | own |"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotary_angles_stay_in_fp32_whatever_the_model_becomes(dtype):
    config = EncoderConfig(model_type="modernbert", num_hidden_layers=1)
    tables = RotaryTables(config, PreNormSettings.of(config))
    cos, sin = tables("full_attention")
    after = tables.to(dtype)("full_attention")
    assert torch.equal(after[0], cos) and torch.equal(after[1], sin)
    assert after[0].dtype == after[1].dtype == torch.float32


def test_modernbert_s_fields_by_default_and_of_old_files():
    theirs = transformers.ModernBertConfig()
    depth = theirs.num_hidden_layers
    settings = PreNormSettings.of(EncoderConfig(model_type="modernbert", num_hidden_layers=depth))
    assert settings.layer_types == tuple(theirs.layer_types)
    assert settings.window == theirs.local_attention // 2
    assert settings.thetas == {k: v["rope_theta"] for k, v in theirs.rope_parameters.items()}
    old = {"global_rope_theta": 5e4, "local_rope_theta": 2e4, "global_attn_every_n_layers": 2}
    config = EncoderConfig(model_type="modernbert", num_hidden_layers=3, extra=old)
    settings = PreNormSettings.of(config)
    assert settings.thetas == {"full_attention": 5e4, "sliding_attention": 2e4}
    assert settings.layer_types == ("full_attention", "sliding_attention", "full_attention")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("layer_types", ["full_attention"], "layer_types must be 3 of full_attention, sliding_"),
        ("mlp_dropout", 0.1, "mlp_dropout must be 0"),
        ("decoder_bias", False, "decoder_bias true"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling must be none"),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}, "rope_type must be default"),
        ("classifier_pooling", "last", "classifier_pooling must be cls or mean, got 'last'"),
    ],
)
def test_a_modernbert_we_do_not_compute_is_refused(field, value, message):
    config = EncoderConfig(model_type="modernbert", num_hidden_layers=3, extra={field: value})
    with pytest.raises(InputError, match=message):
        PreNormSettings.of(config)
