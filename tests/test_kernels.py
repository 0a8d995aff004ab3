"""Starts the kernel tests under Triton's interpreter, which replaces the compiler for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.name
    for path in (ROOT / "tests").glob("test_kernel_*.py")
    if "kernel_harness" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    interpreted(f"tests/{file}")


@pytest.mark.slow
def test_a_longer_training_run_in_the_interpreter():
    interpreted("tests/test_kernel_training.py", "-m", "slow")


def interpreted(*words: str) -> None:
    """Run tests in a process of their own; all must run and pass."""
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    environment = {name: v for name, v in os.environ.items() if name != "FASTBERT_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=ROOT,
        # an interpreter run takes no notice of a GPU
        env={**environment, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
