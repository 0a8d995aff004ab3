"""The training-step bench on a model small enough for a test, and its command line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from fastbert.bench import machine, peers, train_step
from fastbert.bench.__main__ import COMMANDS, main
from fastbert.bench.train_step import Case
from fastbert.training.loop import has_fast_bf16

TINY = Case(size="tiny", vocab_size=300, sequences=5, mean_length=12.0, longest=24)
CPU = torch.device("cpu")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers comes with the bench extra")


def test_lengths_are_those_of_the_case():
    lengths = Case().lengths()
    assert len(lengths) == 32
    assert lengths.min() >= 5 and lengths.max() == 128
    assert 39 <= lengths.mean() <= 42
    assert np.array_equal(lengths, Case().lengths())
    assert sorted(lengths) == sorted(Case(seed=1).lengths())


def test_examples_mask_what_the_labels_say():
    case = Case()
    examples = case.examples()
    assert np.array_equal(examples.lengths, case.lengths())
    assert (
        np.flatnonzero(examples.input_ids == train_step.MASK) == examples.masked_positions
    ).all()
    assert (examples.input_ids[examples.cu_seqlens[:-1]] == train_step.CLS).all()
    assert (examples.input_ids[examples.cu_seqlens[1:] - 1] == train_step.SEP).all()
    words = len(examples.input_ids) - 2 * len(examples)
    assert abs(len(examples.masked_positions) / words - 0.15) < 0.01
    assert examples.labels.min() >= train_step.FIRST_WORD


def test_both_sides_get_the_same_tokens():
    examples = TINY.examples()
    batch, padded = train_step.packed(examples), peers.padded(examples, CPU)
    real = padded["attention_mask"].bool()
    assert padded["input_ids"].shape == (5, examples.lengths.max())
    assert torch.equal(padded["input_ids"][real], batch.input_ids)
    assert not padded["input_ids"][~real].any()
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.masked_positions[: batch.num_masked]] = batch.labels[: batch.num_masked]
    assert torch.equal(padded["labels"][real], labels)
    assert (padded["labels"][~real] == -100).all()


def test_a_run_holds_parity_rows_and_ratios(transformers):
    result = train_step.run(TINY, repeats=2, warm_up=0, device=CPU)
    dtypes = ["fp32", "bf16"] if has_fast_bf16(CPU) else ["fp32"]
    assert [report["failures"] for report in result["parity"].values()] == [[]] * len(dtypes)
    assert [(row["name"], row["dtype"]) for row in result["rows"]] == [
        (name, dtype) for dtype in dtypes for name in ("fastbert", "transformers")
    ]
    medians = {}
    for row in result["rows"]:
        first, second = row["all_step_ms"]
        step = row["step_ms"]
        assert 0 < step["lowest"] <= step["median"] <= step["highest"]
        assert {step["lowest"], step["highest"]} == {first, second}
        medians[f"{row['name']} {row['dtype']}"] = step["median"]
    for ratio in result["ratios"]:
        expected = medians[ratio["peer"]] / medians[ratio["ours"]]
        # both medians were rounded to a hundredth of a millisecond
        assert abs(ratio["speedup"]["median"] / expected - 1) < 0.02
    assert len(result["ratios"]) == (3 if len(dtypes) == 2 else 1)
    for part in (*medians, "parity: fp32 35 tensors", result["machine"]["torch"]):
        assert part in train_step.table(result)


def test_a_red_parity_refuses_the_rows(transformers, monkeypatch):
    gradients = peers.gradients_by_our_names

    def spoiled(peer, model):
        tensors = gradients(peer, model)
        tensors["masked_lm.bias"] = tensors["masked_lm.bias"] + 0.1
        return tensors

    monkeypatch.setattr(peers, "gradients_by_our_names", spoiled)
    monkeypatch.setattr(train_step, "has_fast_bf16", lambda device: False)
    # spoil the peer alike in fp32 and fp64, and ours is the one outside the rule
    result = train_step.run(TINY, repeats=1, warm_up=0, device=CPU)
    assert result["rows"] == [] and result["ratios"] == []
    assert result["parity"]["fp32"]["failures"][0].startswith("masked_lm.bias: rms error")
    assert any(note.startswith("fp32 refused: masked_lm.bias") for note in result["notes"])
    monkeypatch.setattr(train_step, "run", lambda *_, **__: result)
    assert main(["train-step"]) == 1


def test_bf16_is_skipped_by_name_where_nothing_multiplies_it(transformers, monkeypatch):
    monkeypatch.setattr(train_step, "has_fast_bf16", lambda device: False)
    result = train_step.run(TINY, repeats=1, warm_up=0, device=CPU)
    assert {row["dtype"] for row in result["rows"]} == {"fp32"}
    assert "bf16 skipped: this cpu has no bf16 matrix units" in result["notes"]


def test_the_command_writes_what_it_prints(transformers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "Case", lambda: TINY)
    before = torch.get_num_threads()
    file = tmp_path / "result.json"
    assert main(["train-step", "--quick", "--threads", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["machine"]["threads"] == 1
    assert result["repeats"] == 3
    assert capsys.readouterr().out == train_step.table(result) + "\n"
    assert torch.get_num_threads() == before


def test_without_transformers_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train-step", "--quick"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "pip install 'fastbert[bench]'" in printed


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
