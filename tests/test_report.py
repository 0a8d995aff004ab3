from __future__ import annotations

import json

import pytest

from fastbert.cli import main
from fastbert.errors import InputError
from fastbert.training.report import compare_runs


def write(folder, losses, heldout=None):
    folder.mkdir()
    records = [
        {
            "step": 10 * n,
            "tokens": 1000 * n,
            "seconds": 2.0 * n,
            "tokens_per_s": 500.0,
            "masked_lm_loss": loss,
        }
        for n, loss in enumerate(losses, 1)
    ]
    if heldout is not None:
        figures = {"mlm_loss": heldout, "masked_accuracy": 0.25}
        records.append({"step": 10 * len(losses), "seconds": 9.0, "eval": figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


def test_runs_stand_side_by_side(tmp_path, capsys):
    runs = [write(tmp_path / "a", [5.0, 4.5], 4.25), write(tmp_path / "b", [6.0, None])]
    picture = tmp_path / "both.png"
    assert main(["report", *runs, "--picture", str(picture)]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["run", "steps", "tokens"]
    assert first.split()[1:] == ["20", "2,000", "9", "500", "4.500", "4.250", "25.0%"]
    # a loss that was no number is passed over, an evaluation that never was is a dash
    assert second.split()[1:] == ["20", "2,000", "4", "500", "6.000", "-", "-"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="name a new file"):
        compare_runs(runs, str(picture))


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no run here \(metrics.jsonl is missing\)"):
        compare_runs([str(tmp_path)])
    for content, message in (("", "holds no record yet"), ("{\n", "unreadable")):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(InputError, match=message):
            compare_runs([str(tmp_path)])
