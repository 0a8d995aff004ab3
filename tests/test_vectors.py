from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import stirred, tiny_config, tiny_tokenizer

from fastbert.cli import main
from fastbert.errors import InputError
from fastbert.models import BertModel
from fastbert.tasks.embed import Embed
from fastbert.tasks.saved import Saved, save_task


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=[])
    task = Embed()
    task.max_seq_len = 40
    task.save_model(stirred_body(config, folder), folder)
    tiny_tokenizer().save_pretrained(folder)
    save_task(task, folder)
    return folder


def stirred_body(config, folder):
    folder.mkdir()
    return stirred(BertModel.from_config(config))


def test_vectors_lie_beside_their_ids(model, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("river stone\n\nwinter\n")
    (tmp_path / "b.jsonl").write_text(
        '{"id": "x7", "text": "harbour"}\n{"id": 3, "text": "stone"}\n'
    )
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    out = tmp_path / "v.npy"
    command = ["embed", "--model", str(model), "--out", str(out), "--dtype", "fp32", *files]
    assert main(command) == 0
    assert "4 x 36 float32" in capsys.readouterr().out
    vectors = np.load(out, mmap_mode="r")
    ids = (tmp_path / "v.ids.txt").read_text().splitlines()
    assert ids == [f"{files[0]}:1", f"{files[0]}:3", "x7", "3"]
    asked = Saved.from_pretrained(model).ask(["river stone", "winter", "harbour", "stone"])
    expected = np.array([answer["embedding"] for answer in asked])
    assert vectors.shape == (4, 36) and np.abs(vectors - expected).max() <= 1e-6
    assert main([*command, "--token-budget", "0"]) == 2
    assert "--token-budget must be at least 1" in capsys.readouterr().err
    # nothing that is there is written over
    assert main(command) == 2
    assert "name a new .npy file" in capsys.readouterr().err


def test_vectors_of_no_text_and_of_another_task(model, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("\n\n")
    out = str(tmp_path / "v.npy")
    assert main(["embed", "--model", str(model), "--out", out, str(tmp_path / "a.txt")]) == 2
    assert "no text" in capsys.readouterr().err
    raw = json.loads((model / "task.json").read_text())
    (model / "task.json").write_text(json.dumps({**raw, "task": "answer"}))
    assert main(["embed", "--model", str(model), "--out", out, str(tmp_path / "a.txt")]) == 2
    assert list(tmp_path.glob("*v.npy*")) == []


def test_sentence_transformers_gives_the_same_vectors(model) -> None:
    theirs = pytest.importorskip("sentence_transformers")
    texts = ["river stone", "winter harbour thunder"]
    found = theirs.SentenceTransformer(str(model), device="cpu").encode(texts)
    ours = Saved.from_pretrained(model).ask(texts)
    expected = np.array([answer["embedding"] for answer in ours], dtype=np.float32)
    # answers are rounded to six digits
    assert np.abs(found - expected).max() <= 1e-6 + 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("version", ["old", "new"])
def test_a_folder_of_sentence_transformers_says_how_vectors_are_made(model, version) -> None:
    (model / "task.json").unlink()
    listed = json.loads((model / "modules.json").read_text())
    (model / "modules.json").write_text(json.dumps(listed[:2]))
    mode = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    if version == "new":
        mode = {"pooling_mode": "cls"}
        (model / "sentence_bert_config.json").write_text("{}")
    length = {"model_max_length": 12 if version == "new" else 30}
    (model / "tokenizer_config.json").write_text(json.dumps(length))
    if version == "old":
        (model / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    (model / "1_Pooling" / "config.json").write_text(json.dumps(mode))
    task = Saved.from_pretrained(model).task
    assert isinstance(task, Embed)
    assert (task.pooling, task.normalise, task.max_seq_len) == ("cls", False, 12)
    other = {"pooling_mode": "max"} if version == "new" else {"pooling_mode_max_tokens": True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"^\S*config.json: pooling must be one of mean, cls, got"):
        Saved.from_pretrained(model)
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (model / "modules.json").write_text(json.dumps([*listed[:1], dense]))
    with pytest.raises(InputError, match=r"^\S*modules.json: vectors go through a Dense"):
        Saved.from_pretrained(model)
    (model / "modules.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"modules.json: unreadable"):
        Saved.from_pretrained(model)
