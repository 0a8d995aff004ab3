"""Starts the kernel tests under Triton's interpreter, which replaces the compiler for good."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each takes half a gigabyte
PROCESSES = 4
FILES = sorted(
    path.name
    for path in (ROOT / "tests").glob("test_kernel_*.py")
    if "kernel_harness" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The chosen files' processes, as many at once as there are processors."""
    chosen = [
        item.callspec.params["file"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_in_the_interpreter"
    ]
    with ThreadPoolExecutor(min(PROCESSES, len(os.sched_getaffinity(0)))) as pool:
        yield {file: pool.submit(interpreted, f"tests/{file}") for file in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, runs: dict[str, Future[None]]) -> None:
    runs[file].result()


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
