"""README's figures are those of the committed result files, and every picture it shows is there."""

from __future__ import annotations

import re

import pytest

from fastbert.bench import figures, results
from fastbert.errors import InputError


@pytest.mark.parametrize("page", figures.PAGES, ids=str)
def test_figures_are_those_of_the_results(page):
    text = (figures.ROOT / page).read_text(encoding="utf-8")
    assert figures.BLOCK.search(text), "the page has no block of figures"
    assert figures.written(text, figures.ROOT, page) == text, "run make figures"


@pytest.mark.parametrize("page", figures.PAGES, ids=str)
def test_every_picture_is_there(page):
    text = (figures.ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+\.(?:svg|png))\)", text)
    assert shown
    for name in shown:
        assert (figures.ROOT / page.parent / name).is_file(), name


def test_a_changed_figure_is_seen():
    text = (figures.ROOT / figures.PAGES[0]).read_text(encoding="utf-8")
    block = figures.BLOCK.search(text).group(2)
    number = re.search(r"\d+\.\d", block).group(0)
    changed = text.replace(block, block.replace(number, "99.9", 1), 1)
    assert changed != text and figures.written(changed, figures.ROOT) == text


def test_what_is_not_measured_says_how(tmp_path):
    (tmp_path / figures.RESULTS).mkdir(parents=True)
    text = "<!-- figures: encode -->\n<!-- end of figures -->"
    made = figures.written(text, tmp_path)
    assert "Not measured yet: `fastbert bench encode --json bench/results/encode-" in made


def test_encoding_without_a_peer_names_none(tmp_path):
    found = figures.load(figures.ROOT, "encode")
    for case in found["cases"]:
        case["rows"] = [row for row in case["rows"] if row["provider"] == "fastbert"]
    path = tmp_path / figures.result_file("encode")
    path.parent.mkdir(parents=True)
    results.write(path, found)
    made = figures.written("<!-- figures: encode -->\n<!-- end of figures -->", tmp_path)
    assert "| **fastbert bf16** |" in made and "the fastest of theirs" not in made


def test_a_block_that_nobody_makes_is_refused():
    text = "<!-- figures: nope -->\n<!-- end of figures -->"
    with pytest.raises(InputError, match="no block 'nope'; there are headline"):
        figures.written(text, figures.ROOT)


def test_committed_runs_are_whole():
    """Of one machine, with every sample, and nothing of ours red."""
    suites = figures._measured(figures.ROOT)
    assert "train-step" in suites
    for suite in suites:
        run = figures.load(figures.ROOT, suite)
        for case in run["cases"]:
            for row in case["rows"]:
                assert row["status"] != "refused" or row["provider"] != "fastbert", suite
                if row["status"] == "measured":
                    assert len(row["samples_ms"]) == run["repeats"], (suite, row)
