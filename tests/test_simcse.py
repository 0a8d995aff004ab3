"""Plain sentences as training data: dropout makes two of each (Gao et al. 2021)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import WORDS, stirred, tiny_config, tiny_tokenizer

from fastbert.kernels.ops import Rng
from fastbert.models import BertModel
from fastbert.tasks.groups import Group, Groups
from fastbert.tasks.registry import make_task
from fastbert.tasks.saved import Saved
from fastbert.training import finetune as finetune_module
from fastbert.training.finetune import finetune
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.meter import read_metrics

FILLERS, CONTENT = WORDS[:2], WORDS[2:]


def spoken(rng: np.random.Generator, content: list[str]) -> str:
    """Some words among others that every sentence is full of."""
    words = [*content, *rng.choice(FILLERS, int(rng.integers(1, 7)))]
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture
def files(tmp_path) -> tuple[str, str]:
    """Sentences, and pairs scored by how many words of content both have."""
    rng = np.random.default_rng(0)

    def some(count: int) -> list[str]:
        return [str(word) for word in rng.choice(CONTENT, count, replace=False)]

    train = tmp_path / "train.jsonl"
    texts = [spoken(rng, some(4)) for _ in range(200)]
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = ["sentence1\tsentence2\tscore"]
    for _ in range(60):
        one, kept = some(4), int(rng.integers(0, 5))
        two = [*one[:kept], *some(4 - kept)]
        rows.append(f"{spoken(rng, one)}\t{spoken(rng, two)}\t{kept}")
    dev = tmp_path / "dev.tsv"
    dev.write_text("\n".join(rows))
    return str(train), str(dev)


def test_dropout_makes_two_of_one_text() -> None:
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, hidden_dropout_prob=0.3)
    model, task = stirred(BertModel.from_config(config)), make_task("embed")
    task.max_seq_len = 40
    texts = ("river stone bridge", "winter garden")
    rows = Groups(kind="texts")
    rows.extend(Group((text,)) for text in texts)
    task.fit(rows)
    units = task.build(rows, tiny_tokenizer())
    assert np.diff(units.cu_units).tolist() == [2, 2]
    assert units.input_ids[0].tolist() == units.input_ids[1].tolist()
    batch = units.batch([0, 1])
    with torch.no_grad():
        alike = task.forward(model, batch).sequences
        noisy = task.forward(model, batch, Rng(0, 0)).sequences
    assert torch.equal(alike[0], alike[1]) and not torch.equal(noisy[0], noisy[1])


def test_sentences_alone_teach_which_are_alike(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)
    start = tmp_path / "start"
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=[])
    stirred(BertModel.from_config(config)).save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    train, dev = files
    settings = FinetuneConfig(
        str(start),
        train,
        dev,
        str(tmp_path / "run"),
        epochs=12,
        batch_size=20,
        learning_rate=3e-3,
        dropout=0.2,
        dtype="fp32",
        evaluate_epochs=0,
    )
    task = make_task("embed")
    report = finetune(task, settings, say=lambda _: None)
    steps = [r for r in read_metrics(tmp_path / "run") if "sequence_loss" in r]
    assert steps[-1]["sequence_loss"] < 0.5 * steps[0]["sequence_loss"]
    untrained = make_task("embed")
    untrained.max_seq_len = 160
    before = Saved(untrained, [BertModel.from_pretrained(start, new_heads=True)], tiny_tokenizer())
    rows = untrained.read(dev, lambda _: None)
    units = before.build(rows)
    figures = untrained.score(rows, units, before.run(units)).figures
    assert report["spearman"] > figures["spearman"] + 0.1
