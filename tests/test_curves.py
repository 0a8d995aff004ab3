from __future__ import annotations

import json
import struct
import sys

import pytest

from fastbert.training.curves import draw_curves
from fastbert.training.meter import CURVES_FILE, METRICS_FILE


def write_metrics(folder, records) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / METRICS_FILE).write_text(text)


def record(step: int, **more) -> dict:
    return {
        "step": step,
        "seconds": 3.0 * step,
        "learning_rate": 1e-3 / step,
        "tokens_per_s": 5000.0 + step,
        **more,
    }


RECORDS = [
    record(n, masked_lm_loss=7 / n, masked_lm_accuracy=0.1, sequence_loss=0.7) for n in (1, 2, 3)
]
RUNS = {
    "both objectives and evaluations": [
        *RECORDS,
        {"step": 3, "seconds": 9.5, "eval": {"mlm_loss": 2.5, "pair_accuracy": 0.5}},
    ],
    "a classifier": [record(n, sequence_loss=1.0, sequence_accuracy=0.5) for n in (1, 2)]
    + [{"step": 2, "seconds": 9.5, "eval": {"accuracy": 0.5}}],
    "one record": RECORDS[:1],
    "nothing yet": [],
}


@pytest.mark.parametrize("run", RUNS)
def test_a_picture_of_sensible_size(run, tmp_path):
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path, RUNS[run])
    path = draw_curves(tmp_path, "a run", baseline=6.1)
    assert path == tmp_path / CURVES_FILE
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    width, height = struct.unpack(">II", content[16:24])
    assert 800 <= width <= 2000 and 500 <= height <= 1500
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CURVES_FILE, METRICS_FILE])


def test_the_lines_are_those_of_the_records(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))[1]
    )
    write_metrics(tmp_path, RUNS["both objectives and evaluations"])
    draw_curves(tmp_path, "a run", baseline=6.1)
    lines = {
        (axis.get_ylabel(), line.get_label()): list(line.get_ydata())
        for axis in drawn[0].axes
        for line in axis.get_lines()
    }
    assert lines["loss (nats a target)", "masked LM"] == [7.0, 3.5, 7 / 3]
    assert lines["loss (nats a target)", "masked LM, held out"] == [2.5]
    assert lines["loss (nats a target)", "unigram"] == [6.1, 6.1]
    assert list(drawn[0].axes[2].get_lines()[0].get_ydata()) == [1e-3, 5e-4, 1e-3 / 3]
    assert list(drawn[0].axes[3].get_lines()[0].get_ydata()) == [5001.0, 5002.0, 5003.0]


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_metrics(tmp_path, RECORDS)
    assert draw_curves(tmp_path, "a run") is None
    assert not (tmp_path / CURVES_FILE).exists()
