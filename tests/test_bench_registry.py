"""Measuring under a clock of our own: refusals, absences, rates, ratios, and the file."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from fastbert.bench import providers, registry, results, suite
from fastbert.bench.ceilings import Ceilings
from fastbert.bench.parity import Parity
from fastbert.bench.registry import Case, Provider, Work
from fastbert.bench.suite import Suite
from fastbert.errors import InputError

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_per_s=10.0, tflop_per_s={"fp32": 2.0})


def timer(times):
    """Every step taken once, and then the given milliseconds."""

    def timed(steps):
        for step in steps.values():
            step()
        return {name: times[name] for name in steps}

    return timed


def judged(error: float) -> Parity:
    truth = torch.arange(1.0, 9.0, dtype=torch.float64)
    found = Parity(torch.float32)
    found.add({"output": truth * (1 + error)}, {"output": truth.float()}, {"output": truth})
    return found


def provider(name, dtype="fp32", error=None, **fields):
    check = None if error is None else functools.partial(judged, error)
    return Provider(name, dtype, lambda: functools.partial(torch.zeros, 1 << 18), check, **fields)


def case(*found, **work):
    return Case("s", "c", Work(**work), found)


def measure(one, times, **more):
    return registry.measure(one, timer(times), CPU, more.pop("ceilings", CEILINGS), **more)


def test_rates_are_those_of_the_median():
    work = {"real_tokens": 1000, "operations": 4e9, "moved_bytes": 2e7}
    found = measure(case(provider("fastbert"), **work), {"fastbert fp32": [4.0, 9.0, 2.0]})
    (row,) = found.rows
    assert (row.ms.median, row.ms.lowest, row.ms.highest) == (4.0, 2.0, 9.0)
    assert row.samples_ms == [4.0, 9.0, 2.0]
    assert row.real_tokens_per_s == 250_000
    assert row.tflop_per_s == 1.0 and row.mfu == 0.5
    # moving takes 2 ms at 10 GB/s, computing 2 ms at 2 TFLOP/s
    assert row.gb_per_s == 5.0 and row.share_of_floor == 0.5
    # a tensor of 2^18 floats
    assert row.step_mib == 1.0


def test_a_dtype_without_a_ceiling_has_no_share_of_it():
    found = measure(case(provider("fastbert", "int8"), operations=4e9), {"fastbert int8": [4.0]})
    assert found.rows[0].tflop_per_s == 1.0
    assert found.rows[0].mfu is None and found.rows[0].share_of_floor is None


def test_a_red_row_has_no_speed_and_no_ratio():
    sides = (provider("fastbert", error=0.5), provider("peer"))
    found = measure(case(*sides), {"fastbert fp32": [1.0], "peer fp32": [2.0]})
    row, peer = found.rows
    assert row.status == registry.REFUSED and row.reason.startswith("output: rms error")
    assert row.ms is None and row.samples_ms == [] and row.parity > 1
    assert peer.status == registry.MEASURED and found.ratios == []


def test_a_green_row_says_how_near_it_was():
    found = measure(case(provider("fastbert", error=1e-8)), {"fastbert fp32": [1.0]})
    assert found.rows[0].status == registry.MEASURED and 0 < found.rows[0].parity < 1


def test_what_is_absent_names_its_install_line(monkeypatch):
    monkeypatch.setitem(providers.INSTALL, "no_such_package", "pip install no-such-package")
    sides = (
        provider("fastbert"),
        provider("peer", needs=("no_such_package",)),
        provider("card", needs=(providers.GPU,)),
        provider("late", absent="the time is up"),
    )
    rows = measure(case(*sides), {"fastbert fp32": [1.0]}).rows
    assert [row.status for row in rows] == ["measured", "skipped", "skipped", "skipped"]
    assert rows[1].reason == "absent: pip install no-such-package"
    assert rows[2].reason == "needs a GPU" and rows[3].reason == "the time is up"


def test_a_peer_that_breaks_costs_no_other_row():
    def broken():
        raise RuntimeError("no kernel\nand more")

    sides = (provider("fastbert"), Provider("peer", "fp32", broken))
    rows = measure(case(*sides), {"fastbert fp32": [1.0]}).rows
    assert rows[1].status == registry.FAILED and rows[1].reason == "no kernel"
    assert rows[0].ms is not None


def test_a_users_mistake_ends_the_run():
    def mistaken():
        raise InputError("--text: no such file")

    with pytest.raises(InputError, match="no such file"):
        measure(case(Provider("fastbert", "fp32", mistaken)), {})


def test_ours_is_compared_with_its_dtype_and_with_their_fp32():
    names = [("fastbert", "fp32"), ("peer", "fp32"), ("fastbert", "bf16"), ("peer", "bf16")]
    times = {f"{name} {dtype}": [8.0 / 2**n] for n, (name, dtype) in enumerate(names)}
    found = measure(case(*(provider(*name) for name in names)), times, ceilings=None)
    assert {(r.ours, r.peer): r.speedup.median for r in found.ratios} == {
        ("fastbert fp32", "peer fp32"): 0.5,
        ("fastbert bf16", "peer fp32"): 2.0,
        ("fastbert bf16", "peer bf16"): 0.5,
    }


def cases_of_a_suite(options, device):
    yield Case("small", "one", Work(10, 20), [provider("fastbert"), provider("peer", "bf16")])


SMALL = Suite("small", "A suite for tests.", cases_of_a_suite, repeats=2)


@pytest.fixture
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(suite.ceilings, "measure", lambda device, dtypes: CEILINGS)


@pytest.mark.usefixtures("quick_ceilings")
def test_the_file_holds_what_is_printed_and_every_sample(tmp_path, capsys):
    file = tmp_path / "result.json"
    before = torch.get_num_threads()
    assert SMALL.main(["--json", str(file), "--threads", "1"]) == 0
    assert torch.get_num_threads() == before
    found = results.read(file)
    assert found["bench"] == "small" and found["command"] == "fastbert bench small --threads 1"
    assert found["machine"]["threads"] == 1 and found["repeats"] == 2
    (row, _) = found["cases"][0]["rows"]
    assert len(row["samples_ms"]) == 2
    printed = capsys.readouterr().out
    assert printed == results.table(found) + "\n"
    assert "10 real tokens of 20 padded (50% padding)" in printed


@pytest.mark.usefixtures("quick_ceilings")
def test_quick_takes_three_rounds(tmp_path):
    file = tmp_path / "result.json"
    assert SMALL.main(["--quick", "--json", str(file)]) == 0
    assert len(results.read(file)["cases"][0]["rows"][0]["samples_ms"]) == 3


@pytest.mark.usefixtures("quick_ceilings")
def test_a_red_row_of_ours_is_the_exit_status():
    def red(options, device):
        yield case(provider("fastbert", error=0.5), provider("peer"))

    def their_fault(options, device):
        yield case(provider("fastbert"), provider("peer", error=0.5))

    assert Suite("red", "", red).main(["--quick"]) == 1
    assert Suite("theirs", "", their_fault).main(["--quick"]) == 0


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "line 1: is no JSON"),
        ("[]", "is no result of fastbert bench in format 1"),
        (json.dumps({"format": 0, "cases": []}), "is no result of fastbert bench in format 1"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, complaint):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(InputError, match=complaint):
        results.read(file)
    with pytest.raises(InputError, match="cannot read: No such file"):
        results.read(tmp_path / "absent.json")
