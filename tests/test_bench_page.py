"""Charts and page of result files made by hand: what is drawn, and that it can be drawn again."""

from __future__ import annotations

import argparse
import importlib

import pytest

pytest.importorskip("matplotlib", reason="matplotlib comes with the bench extra")

from fastbert.bench import charts, every, page, results
from fastbert.bench.__main__ import main
from fastbert.errors import InputError

HOST = {
    "cpu": "A CPU", "cpu_class": "avx2", "cpu_family": "6", "threads": 2, "cores": 2,
    "torch": "2.13.0", "python": "3.11.7", "commit": "abc",
}  # fmt: skip


def row(provider, dtype="fp32", ms=10.0, **more):
    return {
        "provider": provider, "dtype": dtype, "status": "measured", "real_tokens_per_s": 1e6 / ms,
        "ms": {"median": ms, "lowest": 0.9 * ms, "highest": 1.1 * ms}, **more,
    }  # fmt: skip


def case(name, rows, **fields):
    work = {"real_tokens": 1000, "padded_tokens": 2000, "operations": 4e9, "moved_bytes": 1e8}
    ratios = [
        {"ours": "fastbert fp32", "peer": results.label(r),
         "speedup": {"median": 2.0, "lowest": 1.8, "highest": 2.2}}
        for r in rows
        if r["provider"] != "fastbert" and r["status"] == "measured"
    ]  # fmt: skip
    return {"suite": "s", "name": name, "work": work, "rows": rows, "ratios": ratios,
            "notes": ["a note <b>"], "conditions": {}, **fields}  # fmt: skip


def run_of(suite, cases):
    return {
        "format": 1, "bench": suite, "command": f"fastbert bench {suite}", "repeats": 3,
        "ended": "2026-11-22T12:00:00+00:00", "machine": HOST, "cases": cases,
        "ceilings": {"copy_gb_per_s": 20.0, "tflop_per_s": {"fp32": 0.1, "bf16": 0.4}},
    }  # fmt: skip


PEER = {"provider": "absent", "dtype": "fp32", "status": "skipped", "reason": "absent: pip <x>"}
STEP = run_of("train-step", [case("one", [row("fastbert", step_mib=3.0), row("peer"), PEER])])
SWEEP = run_of(
    "sweep",
    [
        case(f"{name} {value}", [row("fastbert"), row("peer", ms=value)],
             conditions={"quantity": name, "value": value})
        for name in ("padding", "length")
        for value in (10, 60)
    ],
)  # fmt: skip
KERNELS = run_of("kernels", [case("norm, 4 x 4", [row("fastbert", tflop_per_s=0.05)])])


def test_every_chart_is_drawn_twice_alike(tmp_path):
    runs = [STEP, SWEEP, KERNELS]
    first = page.pictures(runs, tmp_path / "a")
    names = {path.name for path in first}
    wanted = {"train-step-0", "sweep-padding", "sweep-length", "roofline"}
    assert names == {f"{name}.{kind}" for name in wanted for kind in ("svg", "png")}
    page.pictures(runs, tmp_path / "b")
    for path in first:
        if path.suffix == ".svg":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_say_what_the_rows_say():
    figure = charts.bars(STEP["cases"][0], "a title")
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert texts == {"100,000", "3", "not counted"}
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == ["fastbert fp32", "peer fp32"]


def test_no_name_lies_across_a_ceiling():
    peaks = KERNELS["ceilings"]["tflop_per_s"]
    rows = [row("fastbert", dtype=dtype, tflop_per_s=0.98 * peak) for dtype, peak in peaks.items()]
    products = case("product, 4 x 4", rows)
    products["work"] |= {"operations": 1e6, "moved_bytes": 1e3}
    figure = charts.roofline(KERNELS | {"cases": [*KERNELS["cases"], products]}, "a title")
    figure.canvas.draw()
    axis = figure.axes[0]
    names = [text for text in axis.texts if text.get_text().startswith("product")]
    assert len(names) == len(peaks)
    for peak in peaks.values():
        height = axis.transData.transform((1.0, 1e3 * peak))[1]
        for name in names:
            box = name.get_window_extent()
            assert not box.y0 < height < box.y1, name.get_text()


def test_the_page_holds_charts_tables_and_reasons(tmp_path, capsys):
    files = []
    for found in (STEP, SWEEP):
        files.append(tmp_path / f"{found['bench']}.json")
        results.write(files[-1], found)
    assert main(["page", *map(str, files), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    assert text.count("<svg") == 3 and "http://www.w3.org" in text
    assert "skipped: absent: pip &lt;x&gt;" in text and "a note &lt;b&gt;" in text
    assert "A CPU (avx2" in text and "fastbert bench sweep" in text
    # nothing is fetched: the page works alone
    assert "<script" not in text and 'src="' not in text


def test_without_matplotlib_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'fastbert\[bench\]'"):
        charts.pyplot()


def test_all_names_what_it_skips_and_goes_on(tmp_path):
    said = []
    parts = [
        every.Part("card", "nowhere", needs_gpu=True),
        every.Part("long", "nowhere", quick_words=None),
        every.Part("none", "nowhere", None, None, why="no data"),
        every.Part("mistaken", "fastbert.bench.compare", quick_words=("a",)),
    ]

    def compare(words):
        raise InputError("a: cannot read")

    every.importlib.import_module("fastbert.bench.compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.bench.compare.main", compare)
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert every.run(parts, tmp_path, quick=True, say=said.append) == 0
    assert "card: skipped, needs a GPU" in said
    assert any(line.startswith("long: skipped, takes minutes") for line in said)
    assert "none: skipped, no data" in said and "mistaken: skipped, a: cannot read" in said


class Parsed(Exception):
    pass


def test_every_part_of_all_takes_the_flags_that_it_is_given(tmp_path, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser, words):
        parse_args(parser, words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for part in every.parts():
        for words in (part.words, part.quick_words):
            if words is not None:
                with pytest.raises(Parsed):
                    importlib.import_module(part.module).main(
                        [*words, *every.written(part, tmp_path)]
                    )


def test_every_part_of_all_has_a_command():
    from fastbert.bench.__main__ import COMMANDS

    for part in every.parts():
        assert COMMANDS[part.name][0] == part.module
