from __future__ import annotations

import dataclasses

import pytest
import torch

from fastbert.bench import gpu, kernels
from fastbert.cli import main


def small(case: kernels.Case) -> kernels.Case:
    return dataclasses.replace(case, kernels=())


def test_the_floor_is_the_larger_of_moving_and_computing():
    card = gpu.Ceilings(copy_gb_per_s=3000.0, matmul_tflop_per_s=800.0)
    assert card.floor_ms(3e9, 0.0) == pytest.approx(1.0)
    assert card.floor_ms(3e6, 800e9) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "registers, num_warps, shared_bytes, programs",
    [(128, 4, 0, 4), (32, 4, 0, 16), (255, 8, 0, 1), (32, 4, 100 * 1024, 2), (16, 1, 0, 32)],
)
def test_occupancy(registers, num_warps, shared_bytes, programs):
    assert kernels.programs_at_once(registers, num_warps, shared_bytes) == programs


def test_bytes_and_operations_of_the_cases():
    found = {(case.name, case.shape): case for case in kernels.cases()}
    norm = found["layer_norm, forward", (16384, 768)]
    assert norm.moved_bytes == 3 * 16384 * 768 * 2
    block = found["feed_forward, forward + backward", (16384, 768, 3072)]
    assert block.operations == 6 * 2 * 16384 * 768 * 3072


def test_a_row_whose_parity_fails_is_refused(monkeypatch):
    case = next(iter(kernels.cases()))
    right = torch.randn(50, dtype=torch.float64)
    judged = kernels.Parity(kernels.DTYPE)
    judged.add({"output": 1.1 * right}, {"output": right}, {"output": right})
    monkeypatch.setattr(kernels, "_parity", lambda *_: judged)
    row = kernels.measure(case, gpu.Ceilings(1.0, 1.0))
    assert row.refused and row.ms == 0.0
    assert "refused" in kernels.table([row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_there_are_no_times(monkeypatch, capsys):
    found = [small(case) for case in kernels.cases() if case.shape[1] == 768]
    monkeypatch.setattr(kernels, "cases", lambda: iter(found))
    monkeypatch.setattr(kernels, "CPU_ROWS", 3)
    assert main(["bench", "kernels"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU: kernel speed needs one")
    assert "feed_forward, forward" in printed and " ms" not in printed
