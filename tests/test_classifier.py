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


@pytest.mark.parametrize("length", ["64", 10_000, 161, 1, 7, 0, -5, 64.0, True, [64]])
def test_a_length_that_the_model_cannot_take(tmp_path, length) -> None:
    save(tmp_path)
    (tmp_path / "task.json").write_text(json.dumps({"pair": False, "max_seq_len": length}))
    message = r"task\.json: max_seq_len must be a whole number from 8 to the model's 160 positions"
    with pytest.raises(InputError, match=message):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [8, 160, None])
def test_lengths_that_it_can_take(tmp_path, length) -> None:
    save(tmp_path)
    TaskFacts(False, length).save(tmp_path)
    assert Classifier.from_pretrained(tmp_path).facts.max_seq_len == length


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "unreadable"),
        ('{"pair": "no", "max_seq_len": 64}', "pair must be true or false, got 'no'"),
    ],
)
def test_facts_that_cannot_be_read(tmp_path, content, message) -> None:
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(InputError, match=rf"task\.json: {message}"):
        TaskFacts.read(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path) -> None:
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size - 1)
    BertForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the tokenizer has .* they are not of one model"):
        Classifier.from_pretrained(tmp_path)
