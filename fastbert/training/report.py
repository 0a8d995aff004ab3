"""Several runs beside one another: a table, and one picture of their curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.training.meter import METRICS_FILE, read_metrics

# name in a record, heading, format
_COLUMNS = (
    ("step", "steps", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("seconds", "seconds", "{:,.0f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("masked_lm_loss", "mlm loss", "{:.3f}"),
    ("mlm_loss", "held out", "{:.3f}"),
    ("masked_accuracy", "accuracy", "{:.1%}"),
)


def compare_runs(folders: Sequence[str], picture: str | None = None) -> list[str]:
    """Runs side by side, as they stand: finished, going on or stopped.

    Args:
        folders: of runs.
        picture: a .png to draw loss over tokens and over minutes into; None for none.

    Returns:
        Lines of a table: under `mlm loss` the last record's, under `held out` the newest score.

    Raises:
        InputError: a folder without metrics, a picture that is there, or matplotlib missing.
    """
    runs = {name: _records(Path(name)) for name in folders}
    rows = [["run", *(heading for _, heading, _ in _COLUMNS)]]
    for name, records in runs.items():
        last = _last(records)
        cells = [shown.format(last[key]) if key in last else "-" for key, _, shown in _COLUMNS]
        rows.append([name, *cells])
    if picture is not None:
        _draw(runs, Path(picture))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        records = read_metrics(folder)
    except FileNotFoundError:
        raise InputError(f"{folder}: no run here ({METRICS_FILE} is missing)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / METRICS_FILE}: unreadable: {error}") from None
    if not records:
        raise InputError(f"{folder}: {METRICS_FILE} holds no record yet")
    return records


def _last(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of every figure."""
    found: dict[str, Any] = {}
    for record in records:
        figures = {**record, **record.get("eval", {})}
        found |= {name: value for name, value in figures.items() if value is not None}
    return found


def _draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    if path.exists() or not path.parent.is_dir():
        raise InputError(f"--picture {path}: name a new file in a folder that exists")
    try:
        import matplotlib
    except ImportError:
        raise InputError("--picture needs matplotlib: pip install 'fastbert[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for name, records in runs.items():
        for axis, key, unit in ((axes[0], "tokens", 1e6), (axes[1], "seconds", 60.0)):
            points = [
                (r[key] / unit, r["masked_lm_loss"])
                for r in records
                if key in r and r.get("masked_lm_loss") is not None
            ]
            if points:
                (line,) = axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
                colour = line.get_color()
                held_out = [
                    (_at(records, r, key) / unit, r["eval"]["mlm_loss"])
                    for r in records
                    if "mlm_loss" in r.get("eval", {})
                ]
                if held_out:
                    axis.plot(*zip(*held_out, strict=True), "o", color=colour)
    for axis, label in ((axes[0], "million tokens"), (axes[1], "minutes")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("masked-LM loss (nats a target); dots: held out")
    axes[0].legend()
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    plt.close(figure)
    with atomic_write(path, "wb") as file:
        file.write(content.getvalue())


def _at(records: list[dict[str, Any]], evaluation: dict[str, Any], key: str) -> float:
    """Tokens, or seconds, when an evaluation was made: evaluations record steps and seconds."""
    if key in evaluation:
        return float(evaluation[key])
    earlier = [r[key] for r in records if key in r and r["step"] <= evaluation["step"]]
    return float(earlier[-1]) if earlier else 0.0
