"""metrics.jsonl as a picture: loss, accuracy, learning rate, throughput."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fastbert.files import atomic_write
from fastbert.training.meter import CURVES_FILE, read_metrics


def draw_curves(folder: Path, title: str, baseline: float | None = None) -> Path | None:
    """Draw a run's curves.png from its metrics.jsonl.

    Args:
        folder: of the run.
        title: above the picture.
        baseline: a loss to draw as a level line: the unigram's, for the masked-LM loss.

    Returns:
        The picture, or None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in read_metrics(folder) if "tokens_per_s" in r]
    evaluations = [r for r in read_metrics(folder) if "eval" in r]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    (loss, accuracy), (rate, speed) = axes
    for name, label in (("masked_lm_loss", "masked LM"), ("sequence_loss", "sequence")):
        _line(loss, records, name, label)
    for name, label in (("masked_lm_accuracy", "masked LM"), ("sequence_accuracy", "sequence")):
        _line(accuracy, records, name, label)
    held_out = [
        (r["seconds"] / 60, r["eval"]["mlm_loss"]) for r in evaluations if "mlm_loss" in r["eval"]
    ]
    if held_out:
        loss.plot(*zip(*held_out, strict=True), "o", label="masked LM, held out", color="black")
    if baseline is not None:
        loss.axhline(baseline, linestyle="--", color="grey", label="unigram")
    _line(rate, records, "learning_rate", None)
    _line(speed, records, "tokens_per_s", None)
    for axis, name in (
        (loss, "loss (nats a target)"),
        (accuracy, "accuracy"),
        (rate, "learning rate"),
        (speed, "real tokens per second"),
    ):
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    accuracy.set_ylim(0, 1)
    for axis in (loss, accuracy):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    for axis in (rate, speed):
        axis.set_xlabel("minutes")
    figure.suptitle(title)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    with atomic_write(folder / CURVES_FILE, "wb") as file:
        file.write(picture.getvalue())
    return folder / CURVES_FILE


def _line(axis: Any, records: list[dict[str, Any]], name: str, label: str | None) -> None:
    points = [(r["seconds"] / 60, r[name]) for r in records if name in r]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
