from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stirred, tiny_config, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification
from fastbert.tasks.classify import Classify
from fastbert.tasks.saved import Saved, members, save_task, task_of


def shape(**fields):
    return tiny_config(vocab_size=tiny_tokenizer().vocab_size, **fields)


def save(folder):
    model = stirred(BertForSequenceClassification.from_config(shape()))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def task_for(*labels: str, **options) -> Classify:
    task = Classify(**options)
    task.labels = list(labels)
    return task


def facts(folder, **facts) -> None:
    (folder / "task.json").write_text(json.dumps({"task": "classify", **facts}))


def same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        torch.equal(ours[name], expected[name]) for name in expected
    )


def test_a_run_or_its_model_folder_is_read_back(tmp_path) -> None:
    saved = save(tmp_path / "model")
    task = task_for("first", "second", "third", long_text="mean", stride=7)
    task.pair, task.max_seq_len = True, 30
    save_task(task, tmp_path / "model")
    for path in (tmp_path, tmp_path / "model"):
        found = Saved.from_pretrained(path)
        assert same(found.models[0].state_dict(), saved.state_dict())
        assert found.tokenizer.tokens == tiny_tokenizer().tokens
        assert found.task.facts() == task.facts() and found.task.labels == task.labels


def test_a_folder_of_transformers_tells_its_task_by_its_class(tmp_path) -> None:
    save(tmp_path)
    assert task_of(tmp_path) == "classify"
    assert Saved.from_pretrained(tmp_path).task.max_seq_len == 160


def test_a_model_of_no_task(tmp_path) -> None:
    BertForMaskedLM.from_config(shape(labels=[])).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"nothing says what this model was trained for"):
        Saved.from_pretrained(tmp_path)


def test_unnamed_labels_get_the_names_transformers_gives_them(tmp_path) -> None:
    save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["id2label"], raw["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    saved = Saved.from_pretrained(tmp_path)
    assert saved.task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert saved.ask(["river"])[0]["label"].startswith("LABEL_")


def test_several_models_answer_by_their_mean(tmp_path) -> None:
    for number in range(2):
        folder = tmp_path / f"seed-{number}" / "model"
        stirred(BertForSequenceClassification.from_config(shape()), number).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "ensemble.json").write_text('{"members": ["seed-0", "seed-1"]}')
    assert [folder.parent.name for folder in members(tmp_path)] == ["seed-0", "seed-1"]
    both = Saved.from_pretrained(tmp_path)
    rows = both.task.rows_of(["river stone", "winter"], ["a:1", "a:2"])
    units = both.build(rows)
    one, two = (
        Saved.from_pretrained(tmp_path / f"seed-{number}").run(units).sequences
        for number in range(2)
    )
    assert (both.run(units).sequences == (one + two) / 2).all() and (one != two).any()
    (tmp_path / "ensemble.json").write_text('{"members": "seed-0"}')
    with pytest.raises(InputError, match="members must be a list"):
        Saved.from_pretrained(tmp_path)


def test_a_head_of_the_same_labels_goes_on_and_another_does_not(tmp_path) -> None:
    saved = save(tmp_path)
    again, fresh = task_for("first", "second", "third").load(tmp_path)
    assert fresh == [] and same(again.state_dict(), saved.state_dict())
    for labels in (["x", "y", "z"], ["first", "second"]):
        other, fresh = task_for(*labels).load(tmp_path)
        assert fresh == ["classifier"] and other.config.labels == labels
        ours, theirs = other.state_dict(), saved.state_dict()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours if not n.startswith("classifier"))
        assert not torch.equal(other.classifier.dense.bias[:2], saved.classifier.dense.bias[:2])


def test_a_checkpoint_without_a_pooler_says_so(tmp_path) -> None:
    BertForPreTraining.from_config(shape(labels=[])).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if "pooler" not in n}
    save_file(tensors, path, metadata={"format": "pt"})
    _, fresh = task_for("a", "b").load(tmp_path)
    assert fresh == ["pooler", "classifier"]


def test_dropout_is_the_models_unless_it_is_given(tmp_path) -> None:
    BertForPreTraining.from_config(shape(labels=[], hidden_dropout_prob=0.0)).save_pretrained(
        tmp_path
    )
    model, _ = task_for("a", "b").load(tmp_path)
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0, 0.1)
    model, _ = task_for("a", "b").load(tmp_path, dropout=0.3)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.3
    assert model.classifier.dropout_p == 0.3


@pytest.mark.parametrize("length", ["64", 10_000, 161, 1, 7, 0, -5, 64.0, True, [64]])
def test_a_length_that_the_model_cannot_take(tmp_path, length) -> None:
    save(tmp_path)
    facts(tmp_path, max_seq_len=length)
    message = r"task\.json: max_seq_len must be a whole number from 8 to the model's 160 positions"
    with pytest.raises(InputError, match=message):
        Saved.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [8, 160])
def test_lengths_that_it_can_take(tmp_path, length) -> None:
    save(tmp_path)
    facts(tmp_path, max_seq_len=length)
    assert Saved.from_pretrained(tmp_path).task.max_seq_len == length


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "unreadable"),
        ("[1]", "unreadable: expected a JSON object"),
        ('{"task": "classify", "pair": "no"}', "pair must be true or false, got 'no'"),
        ('{"task": "classify", "stride": 1.5}', "stride must be a whole number, got 1.5"),
    ],
)
def test_facts_that_cannot_be_read(tmp_path, content, message) -> None:
    save(tmp_path)
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(InputError, match=rf"task\.json: {message}"):
        Saved.from_pretrained(tmp_path)


def test_a_task_of_a_later_version(tmp_path) -> None:
    save(tmp_path)
    (tmp_path / "task.json").write_text('{"task": "translate"}')
    with pytest.raises(InputError, match="nothing says what this model was trained for"):
        Saved.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path) -> None:
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size - 1)
    BertForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the tokenizer has .* they are not of one model"):
        Saved.from_pretrained(tmp_path)
