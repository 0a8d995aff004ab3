"""transformers' own models, accelerated: the same numbers, the same files, the same code."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from families import (
    CASES,
    LENGTHS,
    PAD,
    compare_all,
    labels_for,
    outputs_of,
    padded_batch,
    their_labels,
    their_loss,
    their_model,
    transformers,
)
from oracle import SEEDS, ErrorRule
from tiny import gradients
from torch import nn

import fastbert
from fastbert import fast_layers
from fastbert.errors import InputError
from fastbert.families import FAMILIES

# nothing here is left to transformers
pytestmark = pytest.mark.filterwarnings("error:accelerate")
FAMILY_NAMES = list(FAMILIES)
# theirs of the biases that shift all rivals alike
SHIFTED = {
    "BertForMultipleChoice": ("classifier.bias",),
    "BertForQuestionAnswering": (
        "classifier.bias",
        "qa_outputs.bias",
        "layer.1.output.LayerNorm.bias",
        "layer.1.output_layer_norm.bias",
        "groups.1.albert_layers.0.full_layer_layer_norm.bias",
    ),
}


def results(model: nn.Module, family: str, name: str, batch: dict, labels: dict) -> dict:
    """Outputs of real tokens, the loss, and gradients by transformers' names."""
    mask = batch["attention_mask"]
    found = outputs_of(model(**batch), mask)
    if labels:
        loss = their_loss(model, batch, their_labels(family, labels))
        loss.backward()
        found["loss"] = loss.detach()
    else:
        weights = torch.randn(found["states"].shape, generator=torch.Generator().manual_seed(1))
        found["states"].backward(weights.bfloat16().to(found["states"]))
    for key, gradient in gradients(model).items():
        shifts = key.endswith(SHIFTED.get(name, ("nothing",)))
        # a key's bias shifts all scores of a query alike
        if not shifts and not key.endswith(("key.bias", "k_lin.bias")):
            found[key] = gradient
    return found


@pytest.mark.parametrize("family, name", CASES)
def test_values_and_gradients_are_the_stock_model_s(family, name):
    rule = ErrorRule()
    for seed in SEEDS:
        stock = their_model(family, name, seed)
        fast = fastbert.accelerate(copy.deepcopy(stock))
        batch = padded_batch(family, name, seed)
        labels = labels_for(name, batch, seed)
        ours, baseline, oracle = (
            results(model, family, name, batch, labels)
            for model in (fast, stock, copy.deepcopy(stock).double())
        )
        compare_all(rule, ours, baseline, oracle)
    rule.assert_within()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_files_stay_stock_and_restore_undoes_it(family, tmp_path):
    stock = their_model(family, "BertForSequenceClassification")
    batch = padded_batch(family, "BertForSequenceClassification", 0)
    before = stock(**batch).logits
    stock.save_pretrained(tmp_path / "stock")
    classes = [type(module) for module in stock.modules()]
    fast = fastbert.accelerate(stock)
    assert fast is stock and fastbert.accelerate(fast) is stock
    assert [type(m).__name__ for m in fast.modules()] == [c.__name__ for c in classes]
    fast.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert not torch.equal(fast(**batch).logits, before)
    fastbert.restore(fast)
    assert [type(module) for module in stock.modules()] == classes
    assert torch.equal(stock(**batch).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stock.modules())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_padding_is_not_computed(family):
    model = fastbert.accelerate(their_model(family, "BertModel"))
    batch = padded_batch(family, "BertModel", 0)
    seen = []
    norms = [m for m in model.modules() if isinstance(m, nn.Linear)]
    norms[-1].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with torch.no_grad():
        clean = model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        other = {**batch, "input_ids": batch["input_ids"].where(mask != 0, PAD + 1)}
        # in families that count positions by ids, padding must stay padding
        if not FAMILIES[family].positions_after_padding:
            assert torch.equal(model(**other).last_hidden_state, clean)
    assert (clean[mask == 0] == 0).all()
    if family not in ("bert", "roberta", "xlm-roberta", "albert"):
        # the last projection belongs to a layer there, not to a pooler
        assert seen[0][0] == sum(LENGTHS)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_hidden_states_come_back_padded(family):
    stock = their_model(family, "BertModel")
    fast = fastbert.accelerate(copy.deepcopy(stock))
    batch = padded_batch(family, "BertModel", 0)
    rule, real = ErrorRule(), batch["attention_mask"] != 0
    with torch.no_grad():
        ours = fast(**batch, output_hidden_states=True).hidden_states
        theirs = stock(**batch, output_hidden_states=True).hidden_states
        oracle = stock.double()(**batch, output_hidden_states=True).hidden_states
        as_tuple = fast(**batch, output_hidden_states=True, return_dict=False)
    assert len(ours) == len(theirs)
    for own, other, truth in zip(ours, theirs, oracle, strict=True):
        rule.compare("hidden states", own[real], other[real], truth[real])
    rule.assert_within(1)
    again = next(value for value in as_tuple if isinstance(value, tuple))
    assert all(torch.equal(one, other) for one, other in zip(again, ours, strict=True))


def test_what_cannot_be_had_is_refused():
    model = fastbert.accelerate(their_model("bert", "BertModel"))
    batch = padded_batch("bert", "BertModel", 0)
    with pytest.raises(ValueError, match="output_attentions is set"):
        model(**batch, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is set"):
        model(**batch)
    model.config.output_attentions = False
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, length\], got \[4, 1, "):
        model(batch["input_ids"], attention_mask=torch.ones(4, 1, 14, 14))
    with pytest.raises(InputError, match=r"no encoder of bert, roberta, .* in Linear"):
        fastbert.accelerate(nn.Linear(2, 2))
    decoder = transformers.BertConfig(is_decoder=True, num_hidden_layers=1, hidden_size=24)
    decoder.num_attention_heads = 2
    with pytest.raises(InputError, match="is_decoder is set"):
        fastbert.accelerate(transformers.BertModel(decoder))


def test_calls_by_position_without_a_mask_and_with_embeddings():
    stock = their_model("bert", "BertModel")
    fast = fastbert.accelerate(copy.deepcopy(stock))
    batch = padded_batch("bert", "BertModel", 0)
    with torch.no_grad():
        named = fast(**batch).last_hidden_state
        placed = fast(*(batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")))
        assert torch.equal(placed.last_hidden_state, named)
        whole = fast(batch["input_ids"]).last_hidden_state
        ones = fast(batch["input_ids"], torch.ones_like(batch["input_ids"])).last_hidden_state
        assert torch.equal(whole, ones)
        words = fast.embeddings.word_embeddings(batch["input_ids"])
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        assert torch.equal(fast(inputs_embeds=words, **rest).last_hidden_state, named)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_dropout_is_drawn_from_torch_s_seed(family):
    model = their_model(family, "BertModel", **dropout_of(family, 0.3)).train()
    fastbert.accelerate(model)
    # the embedding's own dropout is the stock module's
    for module in model.embeddings.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = padded_batch(family, "BertModel", 0)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(**batch).last_hidden_state)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    model.eval()
    assert torch.equal(model(**batch)[0], model(**batch)[0])


def dropout_of(family: str, p: float) -> dict[str, float]:
    fields = FAMILIES[family].fields
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {fields.get(name, name): p for name in names}


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "modernbert"])
def test_dropout_stands_where_the_family_has_it(family, monkeypatch):
    noted = []
    original = fast_layers.ops.layer_norm

    def layer_norm(*arguments, **options):
        noted.append(options["dropout_p"])
        return original(*arguments, **options)

    monkeypatch.setattr(fast_layers.ops, "layer_norm", layer_norm)
    model = fastbert.accelerate(their_model(family, "BertModel", **dropout_of(family, 0.25)))
    model.train()(**padded_batch(family, "BertModel", 0))
    data, layers = FAMILIES[family], 3 if family == "albert" else 2
    assert noted == [0.25 * data.attention_output_dropout, 0.25 * data.output_dropout] * layers


def test_shared_layers_draw_anew_at_every_depth(monkeypatch):
    drawn = []
    original = fast_layers.post_norm_layer

    def noted(layer, hidden_states, packed, config, number):
        drawn.append(number)
        return original(layer, hidden_states, packed, config, number)

    monkeypatch.setattr(fast_layers, "post_norm_layer", noted)
    model = fastbert.accelerate(their_model("albert", "BertModel"))
    model(**padded_batch("albert", "BertModel", 0))
    assert drawn == [1, 2, 3]


def test_forward_called_by_name_is_the_same_call():
    """sentence-transformers calls `forward` and reads its signature."""
    stock = their_model("bert", "BertModel")
    signature = inspect.signature(stock.forward)
    fast = fastbert.accelerate(stock)
    batch = padded_batch("bert", "BertModel", 0)
    assert inspect.signature(fast.forward) == signature
    called = fast(**batch).last_hidden_state
    assert torch.equal(fast.forward(**batch).last_hidden_state, called)
    states = torch.zeros(2, 3, 24)
    with pytest.raises(ValueError, match="an accelerated encoder is called through its model"):
        fast.encoder(states)


def test_copies_and_pickles_are_accelerated_too():
    fast = fastbert.accelerate(their_model("bert", "BertForSequenceClassification"))
    batch = padded_batch("bert", "BertForSequenceClassification", 0)
    logits = fast(**batch).logits
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(**batch).logits, logits)
        fastbert.restore(again)
        assert type(again.bert.encoder.layer[0]) is transformers.models.bert.modeling_bert.BertLayer
        assert not torch.equal(again(**batch).logits, logits)
    assert torch.equal(fast(**batch).logits, logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_gradient_checkpointing_changes_no_bit(family, reentrant):
    name = "BertForSequenceClassification"
    model = their_model(family, name, **dropout_of(family, 0.1)).train()
    fastbert.accelerate(model)
    batch = padded_batch(family, name, 0)
    labels = labels_for(name, batch, 0)
    found, calls = [], []
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("Layer", "Block")))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            layer.register_full_backward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        model.zero_grad()
        model(**batch, **labels).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for key, gradient in found[0].items():
        assert torch.equal(found[1][key], gradient), key


def test_checkpointing_computes_layers_twice(monkeypatch):
    computed = []
    original = fast_layers.post_norm_layer
    monkeypatch.setattr(
        fast_layers, "post_norm_layer", lambda *a: computed.append(1) or original(*a)
    )
    model = their_model("bert", "BertForSequenceClassification").train()
    fastbert.accelerate(model).gradient_checkpointing_enable({"use_reentrant": False})
    batch = padded_batch("bert", "BertForSequenceClassification", 0)
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert len(computed) == 2 * model.config.num_hidden_layers


def test_a_model_in_bf16_and_under_autocast():
    stock = their_model("bert", "BertModel")
    batch = padded_batch("bert", "BertModel", 0)
    real = batch["attention_mask"] != 0
    rules = {"whole": ErrorRule(), "autocast": ErrorRule()}
    for seed in SEEDS:
        stock = their_model("bert", "BertModel", seed)
        truth = copy.deepcopy(stock).double()(**batch).last_hidden_state[real]
        fast = fastbert.accelerate(copy.deepcopy(stock))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            own, other = (model(**batch).last_hidden_state[real] for model in (fast, stock))
        rules["autocast"].compare("states", own, other.to(own.dtype), truth.detach())
        with torch.no_grad():
            own, other = (m.bfloat16()(**batch).last_hidden_state[real] for m in (fast, stock))
        assert own.dtype == other.dtype == torch.bfloat16
        rules["whole"].compare("states", own, other, truth.detach())
    for rule in rules.values():
        rule.assert_within()
