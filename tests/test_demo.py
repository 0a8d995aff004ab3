"""The demo from end to end, with a budget of seconds; the real budget is marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from oracle import ErrorRule

from fastbert.cli import main
from fastbert.models import BertForPreTraining
from fastbert.tokenizer import Tokenizer

REPORTED = {
    "mlm_loss_heldout",
    "unigram_loss_heldout",
    "masked_accuracy_heldout",
    "sop_accuracy",
    "classifier_accuracy",
    "classifier_macro_f1",
    "classifier_accuracy_from_scratch",
    "classifier_macro_f1_from_scratch",
    "classifier_majority",
    "real_tokens_per_s",
    "packing_efficiency",
    "peak_rss_gib",
    "seconds",
}
SECONDS = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "fastbert", "demo", "--out", str(out), "--size", "tiny"]
    done = subprocess.run(
        [*command, "--minutes", str(SECONDS / 60)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    (out / "stdout").write_text(done.stdout)
    return out


def test_the_report_has_every_figure_and_they_make_sense(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert set(report) >= REPORTED
    assert report["mlm_loss_heldout"] < report["unigram_loss_heldout"] + 0.5
    assert report["packing_efficiency"] > 0.95
    assert 0.1 < report["peak_rss_gib"] < 8
    assert SECONDS <= report["seconds"]["pretrain"] < SECONDS * 3 + 20
    for name in ("sop_accuracy", "classifier_accuracy", "classifier_accuracy_from_scratch"):
        assert 0.0 < report[name] < 1.0


def test_it_says_what_it_does(demo: Path) -> None:
    printed = (demo / "stdout").read_text()
    for stage in range(1, 7):
        assert f"[{stage}/" in printed
    assert printed.count("[MASK]") == 5
    assert "unigram" in printed and "majority" in printed


def test_files_are_where_the_readme_says(demo: Path) -> None:
    for name in ("model", "classifier"):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt"):
            assert (demo / name / file).is_file(), f"{name}/{file}"
    assert (demo / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
def test_transformers_loads_the_model_and_gives_the_same_logits(
    demo: Path, architecture: str
) -> None:
    import transformers

    theirs, info = getattr(transformers, architecture).from_pretrained(
        demo / "model", output_loading_info=True
    )
    unexpected = {name for name in info["unexpected_keys"] if "seq_relationship" not in name}
    # BertForMaskedLM has no use for the pooler and the pair head
    assert not {name for name in unexpected if "pooler" not in name}
    assert not info["missing_keys"]
    theirs.eval()
    ours = BertForPreTraining.from_pretrained(demo / "model")
    tokenizer = Tokenizer.from_pretrained(demo / "model")
    rule = ErrorRule()
    for text in (
        "Returns a [MASK] of the given shape.",
        "Raise an error if the list is [MASK].",
        "The graph must be connected.",
        "x",
        "Compute the eigenvalues of a matrix and return them in a new array.",
    ):
        ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]])
        with torch.no_grad():
            exact = theirs.double()(input_ids=ids)[0]
            same = theirs.float()(input_ids=ids)[0]
            logits = ours(ids).logits
        assert logits is not None
        rule.compare("logits", logits, same, exact)
    rule.assert_within()


def test_a_second_demo_needs_fresh_and_other_folders_are_left_alone(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(demo), "--minutes", "0.1"]) == 2
    assert "--fresh" in capsys.readouterr().err
    (tmp_path / "run.json").write_text('{"command": "pretrain"}')
    assert main(["demo", "--out", str(tmp_path), "--minutes", "0.1", "--fresh"]) == 2
    assert "not a demo" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_text() == '{"command": "pretrain"}'


@pytest.mark.slow
def test_in_the_default_budget_it_reaches_what_it_must(tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    for seed in range(3):
        out = tmp_path / str(seed)
        assert main(["demo", "--out", str(out), "--seed", str(seed)]) == 0
        reports.append(json.loads((out / "report.json").read_text()))
    for report in reports:
        assert report["unigram_loss_heldout"] - report["mlm_loss_heldout"] >= 1.0
    gains = [r["classifier_accuracy"] - r["classifier_accuracy_from_scratch"] for r in reports]
    over_majority = [r["classifier_accuracy"] - r["classifier_majority"] for r in reports]
    assert mean(gains) >= 0.02
    assert mean(over_majority) >= 0.20
