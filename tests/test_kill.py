"""kill -9 at any moment, and the finished run is bit for bit the undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_documents, tiny_tokenizer


def go(root: Path, folder: Path, kills: int, text: Path, seed: int = 0) -> str:
    """Run the harness; what it prints."""
    harness = root / "tests" / "kill_harness.py"
    folder.mkdir()
    words = [str(kills), str(seed), str(folder), str(text.parent / "tok"), str(text)]
    result = subprocess.run(
        [sys.executable, str(harness), *words],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny_tokenizer().save_pretrained(folder / "tok")
    path = folder / "text.txt"
    path.write_text("\n\n".join(tiny_documents(60)))
    return path


def check(root: Path, tmp_path: Path, kills: int, text: Path) -> str:
    go(root, tmp_path / "whole", 0, text)
    printed = go(root, tmp_path / "killed", kills, text)
    whole = (tmp_path / "whole" / "1.safetensors").read_bytes()
    finished = list((tmp_path / "killed").glob("*.safetensors"))
    assert finished and all(path.read_bytes() == whole for path in finished)
    return printed


def test_five_kills(root, tmp_path, text):
    check(root, tmp_path, 5, text)


@pytest.mark.slow
def test_a_hundred_kills(root, tmp_path, text):
    printed = check(root, tmp_path, 100, text)
    print(printed)
    assert "training" in printed and "preparing" in printed
