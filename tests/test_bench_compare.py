"""What two result files say about each other, on files written by hand."""

from __future__ import annotations

import json

import pytest

from fastbert.bench.__main__ import main

HOST = {
    "cpu": "A CPU", "cpu_class": "avx2", "cpu_family": "6", "threads": 2, "cores": 2,
    "torch": "2.13.0", "python": "3.11.7", "commit": "abc",
}  # fmt: skip


def run_of(ratio, times=(10.0, 20.0), **host):
    """One case: ours and a peer, and their ratio as (median, lowest, highest)."""
    names = ("fastbert", "peer")
    rows = [
        {"provider": name, "dtype": "fp32", "status": "measured",
         "ms": {"median": ms, "lowest": ms, "highest": ms}}
        for name, ms in zip(names, times, strict=True)
    ]  # fmt: skip
    speedup = dict(zip(("median", "lowest", "highest"), ratio, strict=True))
    ratios = [{"ours": "fastbert fp32", "peer": "peer fp32", "speedup": speedup}]
    return {
        "format": 1,
        "bench": "s",
        "command": "fastbert bench s",
        "ended": "2026-11-22T12:00:00+00:00",
        "machine": {**HOST, **host},
        "cases": [{"suite": "s", "name": "c", "rows": rows, "ratios": ratios}],
    }


@pytest.fixture
def compare(tmp_path, capsys):
    def compared(before, after):
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, run in zip(files, (before, after), strict=True):
            file.write_text(json.dumps(run))
        return main(["compare", *map(str, files)]), capsys.readouterr().out

    return compared


@pytest.mark.parametrize(
    "before, after, verdict, status",
    [
        ((2.0, 1.9, 2.1), (1.5, 1.4, 1.6), "worse", 1),
        ((2.0, 1.9, 2.1), (2.5, 2.4, 2.6), "better", 0),
        # the old spread covers the new median, or the new one the old
        ((2.0, 1.4, 2.1), (1.5, 1.4, 1.6), "same", 0),
        ((2.0, 1.9, 2.1), (1.5, 1.4, 2.2), "same", 0),
        ((2.0, 1.9, 2.1), (2.0, 1.9, 2.1), "same", 0),
    ],
)
def test_a_ratio_moves_when_it_leaves_the_spread(compare, before, after, verdict, status):
    code, printed = compare(run_of(before), run_of(after))
    assert code == status
    assert f"{verdict:<7} c: fastbert fp32 to peer fp32 {before[0]:.2f}" in printed


def test_times_are_compared_within_a_class_of_machine(compare):
    ratio = (2.0, 1.9, 2.1)
    _, printed = compare(run_of(ratio), run_of(ratio, times=(5.0, 10.0)))
    assert "c: fastbert fp32 10 -> 5 (-50%)" in printed
    _, printed = compare(run_of(ratio), run_of(ratio, times=(5.0, 10.0), cpu_class="avx512f"))
    assert "-50%" not in printed
    assert "times are not compared: cpu-avx2 and cpu-avx512f are two machines" in printed


def test_what_is_missing_is_named_with_its_reason(compare):
    before, after = run_of((2.0, 1.9, 2.1)), run_of((2.0, 1.9, 2.1))
    row = after["cases"][0]["rows"][1]
    row["status"], row["reason"] = "skipped", "absent: pip install peer"
    after["cases"][0]["ratios"] = []
    _, printed = compare(before, after)
    assert "missing c: peer fp32: skipped: absent: pip install peer" in printed
    after["cases"] = []
    _, printed = compare(before, after)
    assert "missing c: fastbert fp32: not in the second run" in printed


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
