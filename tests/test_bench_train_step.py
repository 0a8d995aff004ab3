"""The training-step bench on a model small enough for a test, and its command line."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from fastbert.bench import ceilings, machine, peers, results, step_sides, train_step
from fastbert.bench.__main__ import COMMANDS, main
from fastbert.bench.workload import Workload
from fastbert.training.loop import has_fast_bf16

TINY = ["--size", "tiny", "--vocab-size", "300", "--sequences", "4", "--lengths", "queries"]
CPU = torch.device("cpu")
DTYPES = ["fp32", "bf16"] if has_fast_bf16(CPU) else ["fp32"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(step_sides, "PARITY_BATCHES", 2)
    monkeypatch.setattr(train_step, "POOL_BATCHES", 3)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers comes with the bench extra")


def measured(tmp_path, *words):
    file = tmp_path / "result.json"
    code = main(["train-step", *TINY, "--repeats", "2", "--json", str(file), *words])
    return code, results.read(file)


def test_a_run_holds_both_cases_and_all_sides(transformers, tmp_path, capsys):
    code, found = measured(tmp_path)
    assert code == 0
    batch, pool = found["cases"]
    sides = ("fastbert", "transformers", "transformers, flattened")
    rows = {(row["provider"], row["dtype"]): row for row in batch["rows"]}
    assert rows.keys() == {(side, dtype) for dtype in ("fp32", "bf16") for side in sides}
    for side in sides:
        for dtype in DTYPES:
            row = rows[side, dtype]
            assert row["status"] == "measured", row
            assert 0 < row["ms"]["lowest"] <= row["ms"]["median"] <= row["ms"]["highest"]
            assert row["step_mib"] > 0 and row["mfu"] > 0
    # who is held to the others says how near it is
    assert all(("parity" in row) == (name != "transformers") for (name, _), row in rows.items()
               if row["status"] == "measured")  # fmt: skip
    assert {row["provider"] for row in pool["rows"]} == {"fastbert", "transformers, sorted"}
    assert pool["conditions"]["sequences"] == 3 * batch["conditions"]["sequences"]
    real = {case["work"]["real_tokens"] for case in (batch, pool)}
    assert len(real) == 2 and all(
        case["work"]["padded_tokens"] > case["work"]["real_tokens"] for case in (batch, pool)
    )
    assert "fastbert fp32 is" in capsys.readouterr().out


def test_a_pool_is_dealt_whole():
    examples = Workload(size="tiny", vocab_size=300, sequences=40, lengths="queries").examples()
    tokens = int(examples.lengths.sum())
    batches = step_sides.packed_batches(examples, 8)
    assert sum(batch.num_tokens for batch in batches) == tokens and len(batches) in (8, 9)
    ordered = step_sides.sorted_batches(examples, 5)
    assert [len(part) for part in ordered] == [5] * 8
    assert sum(int(part.lengths.sum()) for part in ordered) == tokens
    ends = [(int(part.lengths.min()), int(part.lengths.max())) for part in ordered]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


def test_a_red_parity_refuses_the_rows(transformers, monkeypatch, tmp_path):
    gradients = peers.gradients_by_our_names

    def spoiled(peer, model):
        tensors = gradients(peer, model)
        tensors["masked_lm.bias"] = tensors["masked_lm.bias"] + 0.1
        return tensors

    # spoil the peer alike in its dtype and in fp64, and ours is the one outside the rule
    monkeypatch.setattr(peers, "gradients_by_our_names", spoiled)
    code, found = measured(tmp_path, "--quick")
    ours = [r for r in found["cases"][0]["rows"] if r["provider"] == "fastbert"]
    assert code == 1 and ours[0]["status"] == "refused" and "ms" not in ours[0]
    assert ours[0]["reason"].startswith("masked_lm.bias: rms error")
    assert found["cases"][0]["ratios"] == []


def test_flattened_without_its_mask_would_be_refused(transformers, monkeypatch, tmp_path):
    flattened = peers.flattened

    def unmasked(examples, device):
        batch = flattened(examples, device)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}

    monkeypatch.setattr(peers, "flattened", unmasked)
    code, found = measured(tmp_path, "--quick")
    rows = {(r["provider"], r["dtype"]): r["status"] for r in found["cases"][0]["rows"]}
    # a peer that is wrong is no fault of ours
    assert code == 0 and rows["transformers, flattened", "fp32"] == "refused"


def test_without_transformers_its_line_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train-step", "--quick", *TINY]) == 1
    assert "skipped: absent: pip install 'fastbert[bench]'" in capsys.readouterr().out


def test_a_result_needs_a_folder(tmp_path, capsys):
    assert main(["train-step", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, found", [(["nope"], "'nope'"), ([], "no name")])
def test_an_unknown_name_gets_one_line(arguments, found, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed == f"fastbert.bench: error: expected one of {', '.join(COMMANDS)}, got {found}\n"


def test_help_lists_every_command(capsys):
    assert main(["-h"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and what in printed for name, (_, what) in COMMANDS.items())


def test_cpu_class_is_the_widest_unit():
    text = "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nmodel name\t: B\n"
    fields = machine.cpu_fields(text)
    assert fields["model name"] == "A CPU"
    assert machine.cpu_class(fields["flags"]) == "avx512_bf16"
    assert machine.cpu_class("fpu avx2") == "avx2"
    assert machine.cpu_class("") not in ("", None)


def test_the_class_of_a_machine_names_its_files():
    assert machine.machine_class({"cpu_class": "avx512_bf16"}) == "cpu-avx512_bf16"
    described = {"cpu_class": "avx2", "gpu": "NVIDIA H100 80GB HBM3"}
    assert machine.machine_class(described) == "nvidia-h100-80gb-hbm3"
