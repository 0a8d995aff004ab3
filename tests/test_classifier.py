from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stirred, tiny_config, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from fastbert.tasks.classifier import Classifier, TaskFacts, load_for_labels


def shape(**fields):
    return tiny_config(vocab_size=tiny_tokenizer().vocab_size, **fields)


def save(folder):
    model = stirred(BertForSequenceClassification.from_config(shape()))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        torch.equal(ours[name], expected[name]) for name in expected
    )


def test_a_run_or_its_model_folder_is_read_back(tmp_path) -> None:
    saved = save(tmp_path / "model")
    TaskFacts(True, 30).save(tmp_path / "model")
    for path in (tmp_path, tmp_path / "model"):
        found = Classifier.from_pretrained(path)
        assert same(found.model.state_dict(), saved.state_dict())
        assert found.tokenizer.tokens == tiny_tokenizer().tokens
        assert found.facts == TaskFacts(True, 30)


def test_a_model_without_a_classifier(tmp_path) -> None:
    BertForMaskedLM.from_config(shape(labels=[])).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not a classifier: config.json names no labels"):
        Classifier.from_pretrained(tmp_path)


def test_unnamed_labels_get_the_names_transformers_gives_them(tmp_path) -> None:
    save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["id2label"], raw["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    classifier = Classifier.from_pretrained(tmp_path)
    assert classifier.model.config.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_facts_are_read_back_and_may_be_absent(tmp_path) -> None:
    assert TaskFacts.read(tmp_path) == TaskFacts(pair=False, max_seq_len=None)
    facts = TaskFacts(pair=True, max_seq_len=77)
    facts.save(tmp_path)
    assert TaskFacts.read(tmp_path) == facts
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(InputError, match=r"task.json: unreadable"):
        TaskFacts.read(tmp_path)


def test_a_head_of_the_same_labels_goes_on_and_another_does_not(tmp_path) -> None:
    saved = save(tmp_path)
    again, fresh = load_for_labels(tmp_path, ["first", "second", "third"])
    assert fresh == [] and same(again.state_dict(), saved.state_dict())
    for labels in (["x", "y", "z"], ["first", "second"]):
        other, fresh = load_for_labels(tmp_path, labels)
        assert fresh == ["classifier"] and other.config.labels == labels
        ours, theirs = other.state_dict(), saved.state_dict()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours if not n.startswith("classifier"))
        assert not torch.equal(other.classifier.dense.bias[:2], saved.classifier.dense.bias[:2])


def test_a_checkpoint_without_a_pooler_says_so(tmp_path) -> None:
    BertForPreTraining.from_config(shape(labels=[])).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if "pooler" not in n}
    save_file(tensors, path, metadata={"format": "pt"})
    _, fresh = load_for_labels(tmp_path, ["a", "b"])
    assert fresh == ["pooler", "classifier"]


def test_dropout_is_the_models_unless_it_is_given(tmp_path) -> None:
    BertForPreTraining.from_config(shape(labels=[], hidden_dropout_prob=0.0)).save_pretrained(
        tmp_path
    )
    model, _ = load_for_labels(tmp_path, ["a", "b"])
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0, 0.1)
    model, _ = load_for_labels(tmp_path, ["a", "b"], dropout=0.3)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.3
    assert model.classifier.dropout_p == 0.3
