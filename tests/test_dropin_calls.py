"""Calls of an accelerated model that are not plain: right, refused, or transformers' own."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from families import padded_batch, their_model
from oracle import ErrorRule
from torch import Tensor, nn

import fastbert
from fastbert import fast_layers
from fastbert.errors import InputError
from fastbert.families import FAMILIES
from fastbert.kernels import ops
from fastbert.packed_call import Packed

NAME = "BertForSequenceClassification"


@pytest.fixture(autouse=True)
def no_warning_is_missed():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="accelerate: ")
        yield


def pair(family: str = "bert", name: str = "BertModel", **fields):
    stock = their_model(family, name, **fields)
    return stock, fastbert.accelerate(copy.deepcopy(stock))


@torch.no_grad()
def same_as_stock(stock: nn.Module, fast: nn.Module, batch: dict[str, Tensor]) -> None:
    """Within the error rule, at real tokens."""
    rule, real = ErrorRule(), batch["attention_mask"] != 0
    sides = (fast, stock, copy.deepcopy(stock).double())
    rule.compare("states", *(side(**batch).last_hidden_state[real] for side in sides))
    rule.assert_within(1)


@torch.no_grad()
def stock_computes(stock: nn.Module, fast: nn.Module, batch: dict, match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        found = fast(**batch)
    assert torch.equal(found[0], stock(**batch)[0])


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_padding_in_front_is_left_to_transformers(family):
    """Heads read the first column, where transformers computes something for padding too."""
    stock, fast = pair(family)
    batch = padded_batch(family, "BertModel", 0)
    batch = {key: tensor.flip(1) for key, tensor in batch.items()}
    stock_computes(stock, fast, batch, "padding before a sequence's first token")
    # an empty sequence has no first token to be missed
    batch = padded_batch(family, "BertModel", 0)
    batch["attention_mask"][2] = 0
    assert not fast(**batch).last_hidden_state[2].any()


def test_holes_in_the_mask():
    stock, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    batch["attention_mask"][1, 3:6] = 0
    same_as_stock(stock, fast, batch)
    stock, fast = pair("modernbert")
    batch = padded_batch("modernbert", "BertModel", 0)
    same_as_stock(stock, fast, batch)
    batch["attention_mask"][1, 3:6] = 0
    # packed, the places of a window would close up
    stock_computes(stock, fast, batch, "padding between a sequence's tokens")


def test_masks_of_other_dtypes_and_shapes():
    _, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    expected = fast(**batch).last_hidden_state
    for dtype in (torch.bool, torch.float32, torch.int32):
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        assert torch.equal(fast(**batch).last_hidden_state, expected)
    for shape in ([4, 13], [3, 14], [14, 4]):
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        with pytest.raises(ValueError, match=r"must be \[batch, length\], here \[4, 14\], got \["):
            fast(**batch)
    with pytest.raises(ValueError, match=r"attention_mask must be .*, got dict"):
        fast(batch["input_ids"], attention_mask={})
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        fast()


def test_position_ids():
    stock, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    batch["position_ids"] = torch.arange(14).flip(0)[None].expand(4, -1)
    same_as_stock(stock, fast, batch)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    placed = fast(ids, mask, batch["token_type_ids"], batch["position_ids"]).last_hidden_state
    assert torch.equal(placed, fast(**batch).last_hidden_state)
    _, fast = pair("modernbert")
    for call in (
        lambda: fast(ids, mask, position_ids=batch["position_ids"]),
        lambda: fast(
            **dict(zip(fast.parameter_names, (ids, mask), strict=False)),
            position_ids=batch["position_ids"],
        ),
    ):
        with pytest.raises(ValueError, match="position_ids of ModernBERT are its own"):
            call()


def test_longer_than_the_configuration_s_positions():
    """Rotary angles go on."""
    stock, fast = pair("modernbert", max_position_embeddings=10)
    same_as_stock(stock, fast, padded_batch("modernbert", "BertModel", 0))


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values"])
def test_a_decoder_s_arguments_are_refused(name):
    _, fast = pair()
    ids = padded_batch("bert", "BertModel", 0)["input_ids"]
    with pytest.raises(ValueError, match="only encoders are supported"):
        fast(ids, **{name: torch.zeros(4, 14, 24)})
    place = fast.parameter_names.index(name)
    with pytest.raises(ValueError, match="only encoders are supported"):
        fast(ids, *[None] * (place - 1), torch.zeros(4, 14, 24))


def test_probabilities_asked_of_a_head_are_refused():
    _, fast = pair(name=NAME)
    with pytest.raises(ValueError, match="output_attentions is set"):
        fast(**padded_batch("bert", NAME, 0), output_attentions=True)


def test_tracing_is_refused():
    _, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    with pytest.raises(ValueError, match="a trace would keep this batch's lengths"):
        torch.jit.trace(fast, (batch["input_ids"], batch["attention_mask"]), strict=False)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_somebody_s_hook_finds_what_it_expects(family):
    stock, fast = pair(family)
    batch = padded_batch(family, "BertModel", 0)
    layers = fast.layers if family == "modernbert" else fast.encoder.layer
    inner = layers[0].mlp if family == "modernbert" else layers[0].attention.self
    outer = fast.embeddings if family == "modernbert" else fast.encoder
    # transformers' own hooks, which stay, are no reason
    fast(**batch, output_hidden_states=True)
    expected = fast(**batch)[0]
    hooks = [
        (layers[1].register_forward_hook, f"a hook on {type(layers[1]).__name__} reads"),
        (layers[1].register_forward_pre_hook, f"a hook on {type(layers[1]).__name__} reads"),
        (inner.register_forward_hook, "was replaced or carries a hook"),
        (inner.register_full_backward_hook, "was replaced or carries a hook"),
    ]
    if family == "bert":
        hooks.append((outer.register_forward_pre_hook, "a hook on BertEncoder reads"))
    else:
        hooks.append((outer.register_forward_hook, "a hook on ModernBertEmbeddings reads"))
    for register, match in hooks:
        handle = register(lambda *given: None)
        stock_computes(stock, fast, batch, match)
        handle.remove()
        assert torch.equal(fast(**batch)[0], expected)
    shapes = []
    last = fast.final_norm if family == "modernbert" else fast.encoder
    last.register_forward_hook(lambda module, args, out: shapes.append(as_tensor(out).shape))
    assert torch.equal(fast(**batch)[0], expected)
    assert shapes == [(4, 14, 24)]


def as_tensor(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_a_replaced_module_is_called():
    class Louder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return 2 * self.inner(states)

    stock, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    for model in (stock, fast):
        model.encoder.layer[1].intermediate = Louder(model.encoder.layer[1].intermediate)
    stock_computes(stock, fast, batch, "intermediate of BertLayer was replaced")


def test_a_layer_of_somebody_else_is_refused():
    class Layer(type(their_model("bert", "BertModel").encoder.layer[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return -hidden_states

    stock = their_model("bert", "BertModel")
    stock.encoder.layer[1] = Layer(stock.config)
    with pytest.raises(InputError, match="Layer of test_dropin_calls is no layer of transformers"):
        fastbert.accelerate(stock)


def test_an_accelerated_model_called_in_the_middle_of_another():
    _, teacher = pair("distilbert")
    _, fast = pair()
    batch = padded_batch("bert", "BertModel", 0)
    alone = fast(**batch).last_hidden_state
    other = {"input_ids": torch.randint(4, 61, (2, 5))}
    seen = []
    fast.encoder.layer[0].output.dense.register_forward_hook(
        lambda *given: seen.append(teacher(**other)) or None
    )
    rule = ErrorRule()
    found = fast(**batch).last_hidden_state
    # the hooked projection adds its own bias: the same sum, rounded otherwise
    oracle = their_model("bert", "BertModel").double()(**batch).last_hidden_state
    real = batch["attention_mask"] != 0
    rule.compare("states", found[real], alone[real], oracle[real])
    rule.assert_within(1)
    assert len(seen) == 1


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dropout_has_the_modules_probabilities(family, monkeypatch):
    """What is switched off after `accelerate` is off, in all layers or in one."""
    stock = their_model(family, "BertModel", **dropout_of(family, 0.5)).train()
    fast = fastbert.accelerate(stock)
    batch = padded_batch(family, "BertModel", 0)
    noted = []
    original = fast_layers.ops.attention, fast_layers.ops.fused_qkv_attention
    for name, operator in zip(("attention", "fused_qkv_attention"), original, strict=True):
        monkeypatch.setattr(
            fast_layers.ops,
            name,
            lambda *a, operator=operator, **k: noted.append(k["dropout_p"]) or operator(*a, **k),
        )
    fast(**batch)
    assert set(noted) == {0.5}
    noted.clear()
    layers = [m for m in fast.modules() if type(m).__name__.endswith(("Layer", "Block"))]
    layers[0].eval()
    fast(**batch)
    assert 0.0 in noted and (0.5 in noted or len(layers) == 1)
    for module in fast.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    torch.manual_seed(0)
    still = fast(**batch).last_hidden_state
    assert torch.equal(still, fast.eval()(**batch).last_hidden_state)


def dropout_of(family: str, p: float) -> dict[str, float]:
    fields = FAMILIES[family].fields
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {fields.get(name, name): p for name in names}


class OnDevice(Tensor):
    """A tensor that says when the host asks for it."""

    asked: list[str]

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in ("cpu", "item", "tolist", "nonzero", "numpy", "__bool__", "__int__", "equal"):
            cls.asked.append(name)
        found = super().__torch_function__(function, kinds, args, kwargs or {})
        return found.as_subclass(Tensor) if name == "cpu" else found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_forward_pass_waits_for_the_device_once(family):
    _, fast = pair(family, NAME)
    batch = padded_batch(family, NAME, 0)
    expected = fast(**batch).logits
    OnDevice.asked = []
    found = fast(**{key: tensor.as_subclass(OnDevice) for key, tensor in batch.items()}).logits
    assert isinstance(found, OnDevice) and OnDevice.asked == ["cpu"]
    assert Tensor.equal(found.as_subclass(Tensor), expected)
    OnDevice.asked = []
    Packed.of(None, (4, 14), torch.device("cpu"))
    assert OnDevice.asked == []


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_under_torch_compile(family):
    """The encoder stays as it is between two graphs: the same bits, and `restore` is seen."""
    stock, fast = pair(family, NAME)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    for seed in (0, 1):
        batch = padded_batch(family, NAME, seed)
        batch["attention_mask"][seed, 4:] = 0
        with torch.no_grad():
            assert torch.equal(compiled(**batch).logits, fast(**batch).logits)
    labels = torch.tensor([0, 1, 2, 0])
    fast.zero_grad()
    compiled(**batch, labels=labels).loss.backward()
    gradients = {name: p.grad.clone() for name, p in fast.named_parameters()}
    fast.zero_grad()
    fast(**batch, labels=labels).loss.backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in fast.named_parameters())
    fastbert.restore(fast)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, stock(**batch).logits)
        fastbert.accelerate(fast)
        assert torch.equal(compiled(**batch).logits, fast(**batch).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_words_of_attention_are_drawn_once_for_all_layers(family, dropout_p, monkeypatch):
    """Kernels that find none draw their own, in every layer."""
    drawn, used = [], []
    attention = ops.fused_qkv_attention

    def with_words(rng, tokens, heads, device):
        drawn.append((tokens, heads, device))
        return dataclasses.replace(rng, words=torch.zeros(2, heads, tokens, dtype=torch.int32))

    def spied(*arguments, **options):
        used.append(options["rng"] and options["rng"].words)
        return attention(*arguments, **options)

    monkeypatch.setattr(ops, "with_attention_words", with_words)
    monkeypatch.setattr(ops, "fused_qkv_attention", spied)
    names = ("attention_dropout", "attention_probs_dropout_prob")
    _, fast = pair(family, **{names[family == "bert"]: dropout_p})
    batch = padded_batch(family, "BertModel", 0)
    fast.train()(**batch)
    heads, layers = fast.config.num_attention_heads, fast.config.num_hidden_layers
    tokens = int(batch["attention_mask"].sum())
    assert len(used) == layers > 1
    if dropout_p:
        assert drawn == [(tokens, heads, torch.device("cpu"))]
        assert all(words is used[0] for words in used)
    else:
        assert not drawn and used == [None] * layers
