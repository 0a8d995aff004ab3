"""Suites over small models: every provider runs, is judged, and does the work that it says."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch

from fastbert.bench import (
    ablation,
    breakdown,
    ceilings,
    layer,
    memory,
    packing,
    results,
    step_sides,
    suite,
    sweep,
)
from fastbert.bench.__main__ import main
from fastbert.bench.distributions import lengths_of
from fastbert.bench.workload import Workload, packed
from fastbert.kernels import ops
from fastbert.packing import IGNORE_INDEX, best_fit
from fastbert.training.loop import has_fast_bf16

pytest.importorskip("transformers", reason="transformers comes with the bench extra")
pytestmark = pytest.mark.skipif(
    not has_fast_bf16(torch.device("cpu")), reason="quick runs are in bf16"
)
TINY = Workload(size="tiny", vocab_size=300, sequences=4, lengths="queries")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(step_sides, "PARITY_BATCHES", 2)


def measured(tmp_path, name, *words):
    file = tmp_path / "result.json"
    assert main([name, "--quick", "--threads", "1", "--json", str(file), *words]) == 0
    return results.read(file)


def statuses(case):
    return {row["provider"]: row["status"] for row in case["rows"] if row["dtype"] == "bf16"}


def test_ablation(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "Workload", lambda: TINY)
    result = measured(tmp_path, "ablation")
    assert result["repeats"] == suite.QUICK_REPEATS
    (case,) = result["cases"]
    found = statuses(case)
    assert found.pop("without CUDA graph") == "skipped"
    assert len(found) == 6 and set(found.values()) == {"measured"}, case["rows"]


def test_a_quick_look_takes_the_rounds_that_were_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, "Workload", lambda: TINY)
    result = measured(tmp_path, "ablation", "--repeats", "2")
    assert result["repeats"] == 2
    assert {len(row["samples_ms"]) for row in result["cases"][0]["rows"] if row.get("ms")} == {2}


def test_without_packing_every_token_is_computed():
    examples = TINY.examples()
    made = ablation.filled(examples)
    longest = int(examples.lengths.max())
    assert made.lengths.tolist() == [longest] * len(examples)
    assert (made.input_ids[made.masked_positions] == examples.input_ids[
        examples.masked_positions]).all()  # fmt: skip
    for number, (start, end) in enumerate(
        zip(examples.cu_seqlens[:-1], examples.cu_seqlens[1:], strict=True)
    ):
        first = number * longest
        row = made.input_ids[first : first + end - start]
        assert np.array_equal(row, examples.input_ids[start:end])


def test_without_the_masked_rows_head_every_position_is_shown():
    batch = packed(TINY.examples())
    made = ablation.every_position(batch)
    assert len(made.masked_positions) == batch.capacity
    kept = made.labels != IGNORE_INDEX
    assert int(kept.sum()) == batch.num_masked
    before = dict(zip(batch.masked_positions.tolist(), batch.labels.tolist(), strict=True))
    assert all(before[int(place)] == int(made.labels[place]) for place in kept.nonzero())


def test_attention_by_sequence_is_attention():
    batch = packed(TINY.examples())
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch.capacity + 3, 3, 2, 32, generator=generator, dtype=torch.float64)
    ours = ops.fused_qkv_attention(qkv, batch.cu_seqlens)
    theirs = ablation.attention_by_sequence(qkv, batch.cu_seqlens)
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(torch.float64).eps


def test_on_a_gpu_kernels_count_once(monkeypatch):
    """Neither operators that launched them nor named spans around them count too."""
    kinds = torch.autograd.DeviceType
    events = [
        types.SimpleNamespace(
            key=key, device_type=kind, self_device_time_total=time_us, is_user_annotation=named
        )
        for key, kind, time_us, named in (
            ("aten::mm", kinds.CPU, 30.0, False),
            ("nvjet_tst_128x256", kinds.CUDA, 30.0, False),
            ("_layer_norm_fwd_kernel", kinds.CUDA, 10.0, False),
            ("Optimizer.step#AdamW.step", kinds.CUDA, 40.0, True),
        )
    ]
    profile = contextlib.nullcontext(types.SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    found = breakdown.shares(lambda: None, torch.device("cuda"))
    assert found == {"matrix products": 0.75, "GELU and norms": 0.25}


def test_breakdown(monkeypatch, tmp_path):
    monkeypatch.setattr(breakdown, "Workload", lambda: TINY)
    (case,) = measured(tmp_path, "breakdown")["cases"]
    for row in case["rows"]:
        assert row["status"] == "measured", row
        assert row["figures"]["matrix products"] > 0 and row["figures"]["optimiser"] > 0


@pytest.mark.parametrize(
    "operator, kind",
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::native_layer_norm_backward", "GELU and norms"),
        ("aten::copy_", "copies and casts"),
        ("aten::_log_softmax", "loss"),
        ("aten::add_", "other"),
    ],
)
def test_operators_by_what_they_do(operator, kind):
    assert breakdown.kind_of(operator) == kind


def test_sweep(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "Workload", lambda **fields: TINY)
    monkeypatch.setattr(sweep, "PADDING_SEQUENCES", 4)
    found = measured(tmp_path, "sweep")
    even, uneven = (case["conditions"]["value"] for case in found["cases"])
    assert even == 0.0 and uneven > 30.0
    for case in found["cases"]:
        assert set(statuses(case).values()) == {"measured"}, case["rows"]


def test_a_peer_that_does_not_fit_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "Workload", lambda **fields: TINY)
    monkeypatch.setattr(sweep, "PADDING_SEQUENCES", 4)
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    memory.MEMORY_INFO.write_text("MemTotal: 64 kB\nMemFree: 9 kB\nMemAvailable: 32 kB\n")
    for case in measured(tmp_path, "sweep")["cases"]:
        by_provider = {row["provider"]: row for row in case["rows"]}
        assert by_provider["fastbert"]["status"] == "measured"
        assert by_provider["transformers"]["status"] == "skipped"
        assert "GiB of memory, 0 are free" in by_provider["transformers"]["reason"]
    assert memory.too_little(32 * 1024, torch.device("cpu")) == ""
    assert memory.too_little(32 * 1024 + 1, torch.device("cpu"))
    memory.MEMORY_INFO.unlink()
    assert memory.too_little(1e15, torch.device("cpu")) == ""


def test_points_of_the_other_quantities():
    for quantity in sweep.QUANTITIES[1:]:
        values = [value for value, _, _ in sweep._points(quantity)]
        assert values == sorted(values) and len(values) >= 3
    lengths = {value: drawn for value, drawn, _ in sweep._points("length")}
    assert lengths[64].sum() == 16 * 48 and lengths[8192].tolist() == [4096, 8192]


def test_layer(monkeypatch, tmp_path):
    monkeypatch.setattr(layer, "PARITY_LENGTHS", (1, 5, 9))
    words = ["--size", "tiny", "--lengths", "queries", "--sequences", "3"]
    (case,) = measured(tmp_path, "layer", *words)["cases"]
    assert set(statuses(case).values()) == {"measured"} and len(case["rows"]) == 6
    judged = {row["provider"] for row in case["rows"] if "parity" in row}
    assert judged == {"fastbert", "nn.TransformerEncoderLayer"}


def test_packing(tmp_path):
    (case,) = measured(tmp_path, "packing", "--lengths", "wiki")["cases"]
    full = {row["provider"]: row["figures"]["full %"] for row in case["rows"]}
    assert full["fastbert"] > full["first come"] > 90
    assert 0 < case["conditions"]["padding_share_sorted"] < case["conditions"]["padding_share"]


def test_first_come_keeps_the_order_and_the_budget():
    lengths = lengths_of("queries", 50)
    batches = packing.first_come(lengths, 64)
    assert [number for part in batches for number in part] == list(range(50))
    assert all(lengths[part].sum() <= 64 for part in batches)
    assert packing.fullness(lengths, best_fit(lengths, 64), 64) <= 1.0
