# ruff: noqa: E402 - the environment is set before torch and the hub library read it
"""What every test runs under: no network, two threads, fixed seeds, the public data."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

# read by huggingface_hub at import, so it is set before anything else comes in
os.environ["HF_HUB_OFFLINE"] = "1"

from fastbert.threads import ask_for_large_pages, sleep_soon

# also for the processes that tests start
sleep_soon()
ask_for_large_pages()

import interpreter
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(2)
# the fp32 baseline of the error rule is true fp32
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # their processes run beside all other tests
    items.sort(key=lambda item: item.path.name == "test_kernels.py")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA or HIP device"))


@pytest.fixture(scope="session", autouse=True)
def interpreter_runs(
    cache: None, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[None]]]:
    """The chosen kernel tests' processes by file, started with the session."""
    chosen = [
        item.callspec.params["file"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_in_the_interpreter"
    ]
    with interpreter.started(chosen) as runs:
        yield runs


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared text of tests goes where they end, also that of processes they start."""
    os.environ["FASTBERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public data sets, which are no part of the project."""
    folder = Path(os.environ.get("FASTBERT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: FASTBERT_DATA names their folder")
    return folder
