"""Scores of a saved model on labelled examples, with what lies behind them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import InputError
from fastbert.files import atomic_write, writing_failed
from fastbert.metrics.classification import ClassScore
from fastbert.tasks.saved import Saved, refuse_non_finite
from fastbert.tasks.task import Scores, shortened
from fastbert.training.loop import compute_dtype, default_device

# inches of a confusion matrix, and letters of a class in it
LARGEST_PICTURE, LONGEST_NAME = 60.0, 40
SCORES_FILE, ERRORS_FILE, CONFUSION_FILE = "scores.json", "errors.jsonl", "confusion.png"


def evaluate_task(
    model: str | os.PathLike[str],
    sources: Sequence[str],
    *,
    dtype: str = "auto",
    out: str | os.PathLike[str] | None = None,
    encoding: str = "utf-8",
    say: Callable[[str], None] = print,
) -> list[str]:
    """Score a fine-tuned model on a file.

    Args:
        model: a run of `fastbert finetune`, or its model folder.
        sources: one file (or folder, where the task reads folders), as in training.
        dtype: of matrix products: auto, fp32 or bf16.
        out: a new folder, or none, for scores.json, errors.jsonl (the rows answered wrongly, where
            answers are right or wrong) and confusion.png.
        encoding: of the file.
        say: told what the reader does.

    Returns:
        Figures and the table by class, line by line.

    Raises:
        InputError: not one source, bad rows, or files that are there already.
    """
    if len(sources) != 1:
        raise InputError(f"evaluate: one file of labelled examples is wanted, got {len(sources)}")
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {out}: is not empty; name a new folder")
    device = default_device()
    saved = Saved.from_pretrained(model, device)
    saved.task.encoding = encoding
    rows = saved.task.read(sources[0], say)
    saved.task.check(rows, sources[0])
    units = saved.build(rows, name=sources[0], say=say)
    raw = saved.run(units, dtype=compute_dtype(dtype, device))
    refuse_non_finite(raw, str(model))
    scores = saved.task.score(rows, units, raw)
    lines = [f"{name:<24} {value:.4f}" for name, value in scores.figures.items()]
    lines += table_lines(scores.table)
    if folder is not None:
        answers = saved.task.answers(rows, units, raw)
        judged = [
            (answer, saved.task.is_right(row, answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
        # a score is neither right nor wrong: an empty file would read as no errors
        known = any(right is not None for _, right in judged)
        wrong = [answer for answer, right in judged if right is False] if known else None
        _write(folder, scores, wrong)
        lines.append(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return lines


def table_lines(table: Sequence[ClassScore]) -> list[str]:
    """A per-class table as aligned text."""
    if not table:
        return []
    width = max(5, *(len(row.name) for row in table))
    head = f"{'class':<{width}}  precision  recall      f1  support"
    return [
        head,
        *(
            f"{row.name:<{width}}  {row.precision:9.4f}  {row.recall:6.4f}  {row.f1:6.4f}  "
            f"{row.support:7,}"
            for row in table
        ),
    ]


def _write(folder: Path, scores: Scores, wrong: Sequence[dict[str, Any]] | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(folder, error) from error
    with atomic_write(folder / SCORES_FILE) as file:
        table = [row.__dict__ for row in scores.table]
        json.dump({**scores.figures, "classes": table}, file, indent=2)
        file.write("\n")
    if wrong is not None:
        with atomic_write(folder / ERRORS_FILE) as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in wrong)
    if scores.confusion is not None:
        draw_confusion(folder / CONFUSION_FILE, *scores.confusion)


def _drawable(names: Sequence[str]) -> list[str]:
    """Names of classes that the picture's font can write; numbers, from 1, for those it cannot."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    # two dollars would be read as mathematics
    return [
        shortened(name, LONGEST_NAME).replace("$", r"\$")
        if all(ord(char) in known for char in name)
        else f"#{number}"
        for number, name in enumerate(names, 1)
    ]


def draw_confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """A confusion matrix as a picture, shares of each true class; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 0.45 * len(names) + 2.0)
    # a picture of a thousand classes must still fit in memory
    scale = min(1.0, LARGEST_PICTURE / size)
    letters = 10.0 * scale
    shown = _drawable(names)
    figure, axis = plt.subplots(figsize=(scale * size, scale * size))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), shown, rotation=90, fontsize=letters)
    axis.set_yticks(range(len(names)), shown, fontsize=letters)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        said = str(counts[row, column])
        axis.text(column, row, said, ha="center", va="center", color=color, fontsize=letters)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    plt.close(figure)
    with atomic_write(path, "wb") as file:
        file.write(picture.getvalue())
