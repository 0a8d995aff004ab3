from __future__ import annotations

import json

import pytest
import torch

from fastbert.bench import __main__ as bench
from fastbert.bench import masked_lm, memory

SHAPE = (60, 16, 50)
CPU = torch.device("cpu")


@pytest.fixture
def one_small_shape(monkeypatch):
    monkeypatch.setattr(masked_lm, "CPU_SHAPES", (SHAPE,))
    monkeypatch.setattr(masked_lm, "GPU_SHAPES", (SHAPE,))
    monkeypatch.setattr(masked_lm, "PARITY_ROWS", 20)


@pytest.mark.usefixtures("one_small_shape")
def test_every_provider_is_timed_and_written(tmp_path, capsys):
    assert bench.main(["masked-lm", "--repeats", "1", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("masked-lm-*.json")
    rows = json.loads(file.read_text())["rows"]
    names = {row["provider"] for row in rows}
    assert names >= {"fastbert", "eager"}
    assert ("F.linear_cross_entropy" in names) == hasattr(torch.nn, "LinearCrossEntropyOptions")
    for row in rows:
        assert not row["refused"] and row["ms"] > 0 and row["parity"] <= 1
        assert row["provider"] in printed


@pytest.mark.usefixtures("one_small_shape")
def test_a_wrong_loss_is_refused(monkeypatch):
    def wrong(hidden, weight, bias, labels):
        return masked_lm._eager(hidden, weight, bias, labels) * 1.01

    monkeypatch.setattr(
        masked_lm, "providers", lambda device: {"fastbert": wrong, "eager": masked_lm._eager}
    )
    assert bench.main(["masked-lm", "--repeats", "1"]) == 1
    refused, timed = masked_lm.measure(SHAPE, CPU, torch.float32, 1)
    assert refused.refused == "outside the error rule" and refused.ms == 0.0
    assert timed.provider == "eager" and timed.ms > 0.0


@pytest.mark.usefixtures("one_small_shape")
def test_a_peer_that_does_not_run_says_why(monkeypatch):
    def broken(*_):
        raise RuntimeError("not on this device\nand more")

    monkeypatch.setattr(
        masked_lm, "providers", lambda device: {"fastbert": masked_lm._ours, "liger": broken}
    )
    rows = masked_lm.measure(SHAPE, CPU, torch.float32, 1)
    assert [row.refused for row in rows] == ["not on this device", ""]
    assert "refused: not on this device" in masked_lm.table(rows)


def test_memory_is_what_tensors_hold_at_once():
    def step():
        for _ in range(2):
            torch.zeros(1 << 18).add(1.0)

    # a tensor and its sum at a time, of the four that were made
    assert 2.0 <= memory.cpu_peak_mib(step) < 2.1
