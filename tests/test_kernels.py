"""The kernel tests under Triton's interpreter: started with the session, asked for at its end."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from interpreter import ROOT, interpreted

# those of a GPU alone have nothing for the interpreter
FILES = sorted(
    path.name
    for path in (ROOT / "tests").glob("test_kernel_*.py")
    if "runs_kernels" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, interpreter_runs: dict[str, Future[None]]) -> None:
    interpreter_runs[file].result()


@pytest.mark.slow
def test_a_longer_training_run_in_the_interpreter():
    interpreted("tests/test_kernel_training.py", "-m", "slow")
