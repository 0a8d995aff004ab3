"""The cases of `fastbert bench kernels` under pytest-benchmark: `pytest bench/regression.py`.

`--benchmark-autosave` keeps a run, `--benchmark-compare-fail=median:5%` holds the next to it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert.bench import kernels

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernel speed needs a GPU")


@pytest.mark.parametrize(
    "case", list(kernels.cases()), ids=lambda case: f"{case.name} {case.shape}"
)
def test_kernel(case: kernels.Case, benchmark: Any) -> None:
    parity = kernels._parity(case, torch.device("cuda"), kernels.PARITY_ROWS)
    assert not parity.failures()
    step = kernels._step(case, "triton", case.operator)

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    benchmark(synchronised)
