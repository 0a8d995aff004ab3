from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_config, tiny_documents, tiny_tokenizer

from fastbert import fast_layers
from fastbert.bench import drop_in, drop_in_text
from fastbert.bench.__main__ import main
from fastbert.errors import InputError
from fastbert.models import BertModel

pytest.importorskip("transformers")

CASE = drop_in.Case(paragraphs=24, longest=24, batch_size=4, training_batches=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=[])
    BertModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = ["<doc id=1>", "too short", "", *tiny_documents(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_every_task_is_timed_beside_the_stock_model(model, text):
    result = drop_in.run(CASE, model, text, dtypes=["fp32"], repeats=1)
    assert not result["parity"]["fp32"]["failures"]
    assert set(result["tasks"]) == set(drop_in.TASKS)
    for task, found in result["tasks"].items():
        labels = [(row["name"], row["order"]) for row in found["rows"]]
        assert labels == [(side, order) for side in ("stock", "fast") for order in drop_in.ORDERS]
        peers = [f"stock fp32 {order}" for order in drop_in.ORDERS]
        assert [ratio["peer"] for ratio in found["ratios"]] == 2 * peers
        assert all(ratio["speedup"]["median"] > 0 for ratio in found["ratios"])
        assert found["sequences"] == (8 if task == "fine-tune" else 24)
        padded = found["padded_tokens"]
        assert found["real_tokens"] <= padded["sorted"] <= padded["unsorted"]
        assert f"{task}: {found['sequences']} sequences" in drop_in.table(result)


def test_wrong_numbers_get_no_row(model, text, monkeypatch):
    original = fast_layers.post_norm_layer
    monkeypatch.setattr(
        fast_layers, "post_norm_layer", lambda *arguments: original(*arguments) + 1e-3
    )
    result = drop_in.run(CASE, model, text, dtypes=["fp32"], tasks=["encode"], repeats=1)
    assert result["parity"]["fp32"]["failures"] and result["tasks"]["encode"]["rows"] == []
    assert any(note.startswith("fp32 refused") for note in result["notes"])


def test_the_command(model, text, tmp_path, capsys):
    out = tmp_path / "result.json"
    threads = torch.get_num_threads()
    flags = ["--model", model, "--text", text, "--paragraphs", "8", "--batch-size", "4"]
    flags += ["--longest", "16", "--repeats", "1", "--threads", "1", "--task", "encode"]
    assert main(["drop-in", *flags, "--dtype", "fp32", "--json", str(out)]) == 0
    assert torch.get_num_threads() == threads
    assert "fast fp32 unsorted is" in capsys.readouterr().out
    assert json.loads(out.read_text())["case"]["paragraphs"] == 8
    assert main(["drop-in", *flags, "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_texts_that_do_not_do(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three four five\n<doc> one two three four five\n", encoding="utf-8")
    assert drop_in_text.read_paragraphs(path, 1) == ["one two three four five"]
    with pytest.raises(InputError, match=r"text\.txt: 1 paragraphs of five words.*, 2 are wanted"):
        drop_in_text.read_paragraphs(path, 2)
    with pytest.raises(InputError, match="cannot read"):
        drop_in_text.read_paragraphs(tmp_path / "nowhere", 1)


def test_defaults_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTBERT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="--text: name a text file"):
        drop_in_text.default_text()
    monkeypatch.setattr(drop_in_text, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="--model: name a folder, or pip install"):
        drop_in_text.default_model()


def test_the_committed_run_is_exact(root):
    (committed,) = (root / "bench" / "results").glob("drop-in-cpu-*.json")
    result = json.loads(committed.read_text(encoding="utf-8"))
    assert result["parity"] and not any(r["failures"] for r in result["parity"].values())
    host = result["machine"]
    assert committed.stem == f"drop-in-cpu-{host['cpu_class']}" and host["commit"]
