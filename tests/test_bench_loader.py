"""The loader's bench on a text small enough for a test, and its command line."""

from __future__ import annotations

import json

from tiny import tiny_documents, tiny_tokenizer

from fastbert.bench import loader
from fastbert.bench.__main__ import COMMANDS, main


def test_every_figure_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "CASES", ((256, 64, "mlm"), (128, 32, "mlm+sop")))
    for name in ("text", "tok"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(tiny_documents(40)))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    out = tmp_path / "result.json"
    words = [str(tmp_path / "text"), "--tokenizer", str(tmp_path / "tok"), "--json", str(out)]
    assert main(["loader", *words, "--cores", "1", "--copies", "2", "--repeats", "1"]) == 0
    result = json.loads(out.read_text())
    assert result["prepare"]["ratio"]["median"] > 0
    for row in result["batches"]:
        assert 0.5 < row["full"] <= 1.0
        assert row["tokens_per_s_0_workers"]["median"] > 0
        assert row["tokens_per_s_1_workers"]["median"] > 0
    assert "times bare encode_batch" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys):
    assert "loader" in COMMANDS
    assert main(["loader", "x.txt", "--tokenizer", "y", "--repeats", "0"]) == 2
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err


def test_goals_that_are_missed_are_named():
    rates = {f"tokens_per_s_{n}_workers": {"median": 1e6 * (1 + n)} for n in (0, 2)}
    row = {"budget": 16384, "max_seq_len": 128, "objective": "mlm", "full": 0.996, **rates}
    fine = {"prepare": {"ratio": {"median": 1.3}}, "batches": [row]}
    assert loader.missed(fine) == []
    slow = {**row, "tokens_per_s_2_workers": {"median": 1.4e6}, "full": 0.99}
    found = loader.missed({"prepare": {"ratio": {"median": 1.31}}, "batches": [slow]})
    case = "mlm at 16384, sequences of 128"
    assert found == [
        "prepare costs 1.31 times bare",
        f"{case}: 1,400,000 tokens/s",
        f"{case}: batches 99.00% full",
    ]
