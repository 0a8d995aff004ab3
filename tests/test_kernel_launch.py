from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert.kernels import launch, ops

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.empty(0)


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the checkout, with nothing of ours in its environment."""
    ours = ("FASTBERT_", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def override_file(tmp_path, monkeypatch):
    path = tmp_path / "launch.json"
    monkeypatch.setenv("FASTBERT_LAUNCH_FILE", str(path))
    launch.overrides.cache_clear()
    yield path
    launch.overrides.cache_clear()


def test_tensors_on_the_cpu_take_the_reference():
    assert launch.uses_triton(CPU) == launch.INTERPRETED
    with ops.use_backend("reference"):
        assert not launch.uses_triton(CPU)


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_triton_without_a_gpu_is_refused_with_the_reason():
    with ops.use_backend("triton"), pytest.raises(ValueError, match=r"needs a CUDA .*INTERPRET=1"):
        ops.layer_norm(torch.ones(2, 64), torch.ones(64), torch.ones(64))


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="must be one of reference, triton, got 'cuda'"):
        ops.use_backend("cuda").__enter__()


def test_use_backend_nests_and_ends_with_an_error():
    before = launch._override
    with pytest.raises(KeyError), ops.use_backend("reference"):
        with ops.use_backend("triton"):
            assert launch._override == "triton"
        assert launch._override == "reference"
        raise KeyError
    assert launch._override == before


def test_the_start_of_a_run_names_the_launches_that_were_measured(override_file):
    assert "no launch is measured on sm_90, all take their defaults" in launch.describe_rows(
        "sm_90"
    )
    row = launch.Measured(launch.Launch(1, 256), "a card")
    entry = launch.table_entry(("layer_norm_fwd", "sm_90", "bfloat16", 768), row)
    override_file.write_text(json.dumps({"rows": [entry]}))
    launch.overrides.cache_clear()
    said = launch.describe_rows("sm_90")
    assert said.startswith(f"1 measured launches ({override_file}): layer_norm_fwd bfloat16 768;")
    assert "no launch is measured" in launch.describe_rows("sm_80")


NORM = """if True:
    import torch
    from fastbert.kernels import ops
    print(ops.describe("cpu"))
    x = torch.ones(2, 64, requires_grad=True)
    ops.layer_norm(x, torch.ones(64), torch.ones(64)).sum().backward()
"""


@pytest.mark.parametrize(
    "environment, printed",
    [
        ({}, "operators on cpu: PyTorch (reference)\n"),
        ({"TRITON_INTERPRET": "1"}, "operators on cpu: Triton's interpreter (slow, for tests)\n"),
        ({"TRITON_INTERPRET": "1", "FASTBERT_BACKEND": "reference"},
         "operators on cpu: PyTorch (reference)\n"),
    ],
)  # fmt: skip
def test_the_environment_decides(environment, printed):
    if "TRITON_INTERPRET" in environment:
        pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    result = python(NORM, **environment)
    assert (result.returncode, result.stdout) == (0, printed), result.stderr


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"FASTBERT_BACKEND": "triton"}, "backend triton: needs a CUDA or HIP tensor"),
        ({"FASTBERT_BACKEND": "gpu"},
         "FASTBERT_BACKEND: must be one of reference, triton, got 'gpu'"),
    ],
)  # fmt: skip
def test_the_environment_asks_for_what_cannot_run(environment, message):
    result = python(NORM, **environment)
    assert result.returncode == 1 and f"ValueError: {message}" in result.stderr


# each in a process of its own, for torch does not let every switch follow every other
SWITCHES = """if True:
    import os
    import torch
    from fastbert.kernels import launch
    matmul = torch.backends.cuda.matmul
    switches = {
        "none": lambda: None,
        "allow_tf32": lambda: setattr(matmul, "allow_tf32", True),
        "high": lambda: torch.set_float32_matmul_precision("high"),
        "highest": lambda: torch.set_float32_matmul_precision("highest"),
        "matmul": lambda: setattr(matmul, "fp32_precision", "tf32"),
        "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    }
    for name, switch in switches.items():
        if not os.fork():
            switch()
            print(name, launch.product_precision(), flush=True)
            os._exit(0)
        os.wait()
"""


def test_products_round_as_any_of_torchs_switches_says():
    result = python(SWITCHES)
    assert result.stdout.splitlines() == [
        "none ieee",
        "allow_tf32 tf32",
        "high tf32",
        "highest ieee",
        "matmul tf32",
        "everything tf32",
    ], result.stderr


WITHOUT_TRITON = """if True:
    import sys
    sys.modules["triton"] = None
    import torch
    from fastbert.config import EncoderConfig
    from fastbert.models import BertForPreTraining
    from fastbert.kernels.ops import Rng
    config = EncoderConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=16)
    model = BertForPreTraining.from_config(config)
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    model(ids, (ids > 0).long(), labels=ids, rng=Rng(1)).loss.backward()
    print("trained", sorted(name for name in sys.modules if "triton" in name.split(".")[0]))
"""


def test_the_cpu_path_works_where_triton_is_missing():
    result = python(WITHOUT_TRITON)
    assert (result.returncode, result.stdout) == (0, "trained ['triton']\n"), result.stderr


def test_where_triton_is_missing_one_line_says_so():
    program = "import sys; sys.modules['triton'] = None\n" + NORM.removeprefix("if True:").replace(
        "\n    ", "\n"
    )
    result = python(program, TRITON_INTERPRET="1")
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "RuntimeError: triton is not installed: pip install triton, "
        "or set FASTBERT_BACKEND=reference"
    )


def test_a_row_of_the_override_file_is_taken(override_file):
    x = torch.empty(4, 768)
    chosen = launch.Launch(rows=2, columns=256, num_warps=8)
    key = ("layer_norm_fwd", "cpu", "float32", 768)
    entry = launch.table_entry(key, launch.Measured(chosen, "a card"))
    override_file.write_text(json.dumps({"rows": [entry]}))
    assert launch.configure("layer_norm_fwd", x, 768) == chosen
    assert launch.configure("layer_norm_fwd", x, 1024) == launch.default("layer_norm_fwd", 1024)
    with launch.assume_architecture("sm_90"):
        assert launch.configure("layer_norm_fwd", x, 768) == launch.default("layer_norm_fwd", 768)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rows": [{"kernel": "a"}]}', '{"rows": [{"launch": {"speed": 1}}]}']
)
def test_a_damaged_override_file_is_named(text, override_file):
    override_file.write_text(text)
    with pytest.raises(ValueError, match=r"launch.json: not a launch table .*fastbert tune"):
        launch.overrides()


@pytest.mark.parametrize("width", [32, 33, 128, 384, 768, 1000, 1024, 4096, 8191, 8192])
@pytest.mark.parametrize("kernel", ["layer_norm_fwd", "layer_norm_bwd"])
def test_default_tiles_are_powers_of_two(kernel, width):
    chosen = launch.default(kernel, width)
    for size in (chosen.rows, chosen.columns, chosen.num_warps):
        assert size & (size - 1) == 0
    assert chosen.columns >= 16 and chosen.num_warps <= 16


def test_every_row_of_the_table_says_where_it_was_measured():
    assert all(row.measured_on for row in launch.TABLE.values())
