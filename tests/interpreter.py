"""Kernel tests in processes of their own: Triton's interpreter replaces the compiler for good."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each takes half a gigabyte
PROCESSES = 4


@contextlib.contextmanager
def started(files: list[str]) -> Iterator[dict[str, Future[None]]]:
    """The files' processes, as many at once as there are processors."""
    # tests that set variables run meanwhile
    environment = dict(os.environ)
    with ThreadPoolExecutor(min(PROCESSES, len(os.sched_getaffinity(0)))) as pool:
        yield {
            file: pool.submit(interpreted, f"tests/{file}", environment=environment)
            for file in files
        }
        pool.shutdown(cancel_futures=True)


def interpreted(*words: str, environment: Mapping[str, str] = os.environ) -> None:
    """Run tests in a process of their own; all must run and pass."""
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    environment = {name: v for name, v in environment.items() if name != "FASTBERT_BACKEND"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    result = subprocess.run(
        # tests that watch a clock run beside these
        ["nice", "-n", "10", *command],
        cwd=ROOT,
        # an interpreter run takes no notice of a GPU
        env={**environment, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout
