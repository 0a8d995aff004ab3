"""`bench check` on runs made by hand: what is run again, and what makes it red."""

from __future__ import annotations

import copy

from test_bench_compare import run_of

from fastbert.bench import check, results
from fastbert.bench.__main__ import main

STEADY, LOW = (2.0, 1.9, 2.1), (1.5, 1.4, 1.6)


def judged(before, after):
    said = []
    return check.judge({"s": before}, lambda run: after, said.append), said


def test_the_same_ratios_pass():
    assert judged(run_of(STEADY), run_of(STEADY)) == (0, ["s: 1 ratios, 0 worse than abc"])


def test_slower_times_at_the_same_ratio_pass():
    assert judged(run_of(STEADY), run_of(STEADY, times=(100.0, 200.0)))[0] == 0


def test_a_worse_ratio_is_named():
    status, said = judged(run_of(STEADY), run_of(LOW))
    assert status == 1 and said[0] == "s: 1 ratios, 1 worse than abc"
    assert "c: fastbert fp32 to peer fp32 2.00" in said[1]


def test_a_row_of_ours_that_is_gone_is_named():
    after = copy.deepcopy(run_of(STEADY))
    row = after["cases"][0]["rows"][0]
    row["status"], row["reason"] = "refused", "loss: rms error"
    after["cases"][0]["ratios"] = []
    status, said = judged(run_of(STEADY), after)
    assert status == 1 and said[1] == "  c: fastbert fp32: refused: loss: rms error"


def test_runs_of_the_class_alone_are_taken(tmp_path):
    results.write(tmp_path / "s-cpu-avx2.json", run_of(STEADY))
    results.write(tmp_path / "s-cpu-avx512f.json", run_of(STEADY))
    (tmp_path / "other-cpu-avx2.json").write_text('{"bench": "loader"}')
    assert check.committed(tmp_path, "cpu-avx2").keys() == {"s"}


def test_a_machine_without_a_result_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    assert main(["check"]) == 2
    assert "commit one first" in capsys.readouterr().err


def test_the_suite_is_run_with_its_own_flags(monkeypatch):
    from fastbert.bench import packing

    before = {**run_of(STEADY), "bench": "packing", "arguments": ["--lengths", "queries"]}
    taken = []

    def measured(words):
        taken.append(words)
        results.write(words[-1], run_of(LOW))

    monkeypatch.setattr(packing, "main", measured)
    assert check.again(before)["cases"] == run_of(LOW)["cases"]
    assert taken[0][:3] == ["--lengths", "queries", "--json"]
