"""The commands for a GPU, gone through on small shapes in the interpreter."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest
import torch
from kernel_harness import ON_GPU, runs_kernels
from pretend_gpu import NAME, pretended_gpu
from tiny import tiny_config

from fastbert.bench import __main__ as bench
from fastbert.bench import gpu, gpu_step, gpu_test, kernels, masked_lm, operators, tune
from fastbert.bench.workload import step_operations
from fastbert.config import EncoderConfig
from fastbert.kernels import launch

__all__ = ["pretended_gpu"]

pytestmark = [
    runs_kernels,
    pytest.mark.skipif(ON_GPU, reason="a machine with a GPU runs the commands themselves"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(gpu, "MATMUL_SIZE", 8)
    monkeypatch.setattr(kernels, "ROWS", 5)
    monkeypatch.setattr(kernels, "PARITY_ROWS", 3)
    monkeypatch.setattr(operators, "VOCABULARY", 50)
    monkeypatch.setattr(tune, "VOCABULARY", 50)
    monkeypatch.setattr(tune, "ROWS", 3)
    monkeypatch.setattr(tune, "MASKED", 3)


@pytest.mark.usefixtures("pretended_gpu")
def test_bench_kernels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "WIDTHS", (64,))
    file = tmp_path / "kernels.json"
    words = ["kernels", "--autotune", "--repeats", "1", "--json", str(file)]
    assert bench.main(words) == 0
    printed = capsys.readouterr().out
    assert "failed" not in printed and "refused" not in printed
    entry = json.loads(file.read_text())
    assert entry["machine"]["gpu"] == NAME
    found = {case["conditions"]["operator"]: case["rows"] for case in entry["cases"]}
    assert found.keys() == {one.name for one in operators.operators(1, 2, (64,))}
    products = [rows for name, rows in found.items() if name.startswith("feed_forward")]
    for rows in products:
        status = {row["provider"]: row["status"] for row in rows}
        assert status.keys() >= {"fastbert", "eager", "compiled", "max-autotune"}
        assert set(status.values()) == {"measured"}


@pytest.mark.usefixtures("pretended_gpu")
def test_no_compiled_peer_is_begun_late(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "WIDTHS", (64,))
    monkeypatch.setattr(kernels, "PEERS_LIMIT_S", -1.0)
    file = tmp_path / "kernels.json"
    assert bench.main(["kernels", "--quick", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["cases"][0]["rows"]
    reasons = {row["provider"]: row.get("reason") for row in rows}
    assert reasons["compiled"] == "the time is up" and reasons["eager"] is None


@pytest.mark.usefixtures("pretended_gpu")
def test_bench_masked_lm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(masked_lm, "GPU_SHAPES", ((7, 32, 50),))
    monkeypatch.setattr(masked_lm, "PARITY_ROWS", 3)
    status = bench.main(["masked-lm", "--repeats", "1", "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "masked-lm-a-pretended-gpu.json").read_text())["rows"]
    assert status == 0 and not any(row["refused"] for row in rows), rows
    assert {row["provider"] for row in rows} >= {"fastbert", "eager", "compiled"}
    assert "7 x 32 x 50" in capsys.readouterr().out


@pytest.mark.usefixtures("pretended_gpu")
def test_tune(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTBERT_LAUNCH_FILE", str(tmp_path / "launch.json"))
    monkeypatch.setattr(tune, "DTYPES", [torch.bfloat16])
    every = tune.candidates

    def few(kernel, size):
        found = list(every(kernel, size))
        return [found[0], found[-1]]

    monkeypatch.setattr(tune, "candidates", few)
    launch.overrides.cache_clear()
    # the clock stands still: nothing is faster than the default
    assert bench.main(["tune", "--widths", "64"]) == 0
    assert "0 rows" in capsys.readouterr().out
    launch.overrides.cache_clear()


@pytest.mark.usefixtures("pretended_gpu")
def test_gpu_test(tmp_path, monkeypatch, capsys):
    todo = {
        "validate layer_norm": [
            sys.executable,
            "-c",
            "print('a warning'); print('{\"device\": \"cuda\", \"results\": [{\"operator\":"
            " \"layer_norm\", \"dtype\": \"float32\", \"passed\": true, \"share\": 0.5}]}')",
        ],
        "test_kernel_x.py": [sys.executable, "-c", "print('3 passed in 1 s')"],
        "test_kernel_y.py": [sys.executable, "-c", "print('E  wrong'); raise SystemExit(1)"],
    }  # fmt: skip
    monkeypatch.setattr(gpu_test, "commands", lambda tests: todo)
    assert bench.main(["gpu-test", "--results", str(tmp_path), "--at-once", "2"]) == 1
    entry = json.loads((tmp_path / "gpu-test-a-pretended-gpu.json").read_text())
    assert [part["name"] for part in entry["parts"]] == list(todo)
    assert [part["status"] for part in entry["parts"]] == [0, 0, 1]
    assert entry["validator"][0]["share"] == 0.5 and entry["ceilings"]["copy_gb_per_s"] > 0
    printed = capsys.readouterr().out
    assert "E  wrong" in printed and "3 passed in 1 s" in printed


def test_every_part_is_a_process_and_none_is_forgotten(root):
    found = gpu_test.commands(root / "tests")
    assert {"validate layer_norm", "validate feed_forward"} <= found.keys()
    assert {"test_kernel_gpu.py", "test_kernel_layer_norm.py", "test_kernel_validate.py"} <= (
        found.keys()
    )
    assert "test_cli.py" not in found and "test_kernel_gpu_commands.py" not in found


def test_the_deadline_ends_every_part():
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    todo = {"slow": slow, "never": slow}
    start = time.monotonic()
    parts = gpu_test.run(todo, start + 2.0, at_once=1)
    assert time.monotonic() - start < 20
    assert [part.status for part in parts] == [gpu_test.TIMED_OUT] * 2
    assert parts[0].stdout.startswith("begun") and "time was up" in parts[1].stdout


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(gpu_step, "TOKEN_BUDGET", 96)
    monkeypatch.setattr(gpu_step, "BATCHES", 2)
    small = dataclasses.replace(
        gpu_step.WIKI, sequences=9, lengths="queries", longest=40, vocab_size=300
    )
    monkeypatch.setattr(gpu_step, "WIKI", small)

    def tiny(size, **fields):
        return tiny_config(hidden_size=96, **fields)

    monkeypatch.setattr(gpu_step.EncoderConfig, "named", tiny)


@pytest.mark.usefixtures("pretended_gpu", "small_steps")
def test_gpu_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_step, "_breakdown", lambda every: ({"a_gemm": 1.0}, {"other": 1.0}))
    # however slow the machine is
    words = ["gpu-step", "--rounds", "2", "--seconds", "3600", "--results", str(tmp_path)]
    status = bench.main(words)
    entry = json.loads((tmp_path / "steps-a-pretended-gpu.json").read_text())
    assert [size["size"] for size in entry["sizes"]] == ["base", "large"]
    rows = {row["name"]: row for row in entry["sizes"][0]["rows"]}
    assert rows.keys() >= {"fastbert", "fastbert, captured", "transformers"}
    for name in ("fastbert", "fastbert, reference", "transformers", "transformers, compiled"):
        assert not rows[name]["failed"] and rows[name]["real_tokens_per_s"] > 0, rows[name]
    assert status == 0
    printed = capsys.readouterr().out
    assert "goal 776,000 real tokens/s, then 1,000,000" in printed and "(goal 2.5)" in printed


def test_operations_of_a_step():
    config = EncoderConfig.named("base", vocab_size=30522)
    case = dataclasses.replace(gpu_step.WIKI, sequences=3)
    examples = case.examples()
    found = step_operations(config, examples.lengths, examples.num_masked.sum())
    tokens = examples.lengths.sum()
    # the linear layers' 14.2 MFLOP a token and layer, and a little for attention and the head
    least = 3 * 12 * 14.155e6 * tokens
    assert least < found < 1.3 * least


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("_layer_norm_bwd_kernel", "norm"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("_bias_activation_fwd_kernel", "activation"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("_column_sum_kernel", "sums"),
        ("_cross_entropy_kernel", "head"),
        ("_gather_rows_kernel", "head"),
        ("_run_sums_kernel", "embedding"),
        ("void at::native::elementwise_kernel", "copies and casts"),
        ("something", "other"),
    ],
)
def test_kernels_by_what_they_do(kernel, kind):
    assert gpu_step.kind_of(kernel) == kind
