from __future__ import annotations

import pytest
import torch

from fastbert.bench import ceilings, kernels, kernels_static, results
from fastbert.bench.operators import operators
from fastbert.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "CPU_ROWS", 9)
    monkeypatch.setattr(kernels, "CPU_PARITY_ROWS", 5)
    monkeypatch.setattr(kernels, "CPU_WIDTHS", (64,))
    monkeypatch.setattr(kernels, "CPU_SEQUENCES", {"sentences": 2})
    monkeypatch.setattr(kernels.masked_lm, "CPU_SHAPES", ((20, 16, 50),))
    monkeypatch.setattr(kernels.masked_lm, "PARITY_ROWS", 20)


def test_the_floor_is_the_larger_of_moving_and_computing():
    card = ceilings.Ceilings(copy_gb_per_s=3000.0, tflop_per_s={"bf16": 800.0})
    assert card.floor_ms(3e9, 0.0, "bf16") == pytest.approx(1.0)
    assert card.floor_ms(3e6, 800e9, "bf16") == pytest.approx(1.0)
    assert card.floor_ms(3e6, 800e9, "int8") is None


@pytest.mark.parametrize(
    "registers, num_warps, shared_bytes, programs",
    [(128, 4, 0, 4), (32, 4, 0, 16), (255, 8, 0, 1), (32, 4, 100 * 1024, 2), (16, 1, 0, 32)],
)
def test_occupancy(registers, num_warps, shared_bytes, programs):
    assert kernels_static.programs_at_once(registers, num_warps, shared_bytes) == programs


def test_bytes_and_operations_of_the_operators():
    found = {one.name: one for one in operators(16384, 2, (768,))}
    assert found["layer_norm, forward"].moved_bytes == 3 * 16384 * 768 * 2
    block = found["feed_forward, forward + backward"]
    assert block.operations == 6 * 2 * 16384 * 768 * 3072


@pytest.mark.usefixtures("small")
def test_on_a_cpu_every_operator_is_timed_in_both_dtypes(tmp_path):
    file = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--repeats", "1", "--json", str(file)]) == 0
    found = results.read(file)
    names = {case["conditions"].get("operator", case["name"]) for case in found["cases"]}
    assert names > {one.name for one in operators(1, 2, (64,))} and len(names) == 10
    for case in found["cases"]:
        rows = {(row["provider"], row["dtype"]): row["status"] for row in case["rows"]}
        assert rows["fastbert", "fp32"] == "measured", case["name"]
        assert len({provider for provider, _ in rows}) >= 2


@pytest.mark.usefixtures("small")
def test_a_wrong_operator_is_refused(monkeypatch, tmp_path):
    right = kernels.ops.layer_norm
    monkeypatch.setattr(kernels.ops, "layer_norm", lambda **tensors: 1.01 * right(**tensors))
    file = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--quick", "--repeats", "1", "--json", str(file)]) == 1
    (case,) = [c for c in results.read(file)["cases"] if c["name"].startswith("layer_norm, forw")]
    status = {(row["provider"], row["dtype"]): row["status"] for row in case["rows"]}
    assert status["fastbert", "fp32"] == "refused" and status["eager", "fp32"] == "measured"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_the_static_picture_has_no_times(monkeypatch, capsys):
    monkeypatch.setattr(kernels_static, "_resources", lambda *_: iter(["a kernel 32"]))
    assert main(["bench", "kernels", "--static"]) == 0
    printed = capsys.readouterr().out
    assert "feed_forward, forward" in printed and " ms" not in printed
