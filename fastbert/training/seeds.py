"""The same fine-tuning from several seeds: mean and deviation, and all of them as an ensemble."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.files import atomic_write
from fastbert.tasks.saved import ENSEMBLE_FILE, Saved
from fastbert.tasks.task import Task
from fastbert.training.finetune import REPORT_FILE, finetune, run_settings, write_report
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.loop import compute_dtype, default_device
from fastbert.training.run_folder import RUN_FILE, check_run


def finetune_seeds(
    task: Task, config: FinetuneConfig, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Fine-tune `config.seeds` times, in folders of their own below `config.out`.

    Args:
        task: with its options.
        config: one seed goes to `finetune`.
        say: told what happens.

    Returns:
        The report: each figure's mean over seeds, its sample standard deviation ("_std"), and
        "ensemble", the figures of the mean of all models' outputs; empty where interrupted.

    Raises:
        InputError: as `finetune`.
    """
    if config.seeds == 1:
        return finetune(task, config, say)
    settings = run_settings(task, config)
    check_run(config.out, settings, resume=config.resume)
    finished = Path(config.out) / REPORT_FILE
    if config.resume and finished.is_file():
        say(f"{config.out}: the run is finished, there is nothing to resume")
        return dict(json.loads(finished.read_text(encoding="utf-8")))
    reports, names, folder = [], [], Path(config.out)
    for seed in range(config.seed, config.seed + config.seeds):
        out = folder / f"seed-{seed}"
        there = (out / RUN_FILE).is_file()
        one = dataclasses.replace(config, seed=seed, seeds=1, out=str(out), resume=there)
        # the first run has looked at all settings and files when it begins
        report = finetune(copy.deepcopy(task), one, say, lambda: _claim_around(folder, settings))
        if not report:
            return {}
        reports.append(report)
        names.append(out.name)
    with atomic_write(folder / ENSEMBLE_FILE) as file:
        json.dump({"members": names}, file, indent=2)
        file.write("\n")
    report = {**spread(reports), "ensemble": _ensemble_figures(folder, task, config)}
    write_report(folder, report)
    say(f"{config.seeds} seeds: {describe_spread(report)}")
    return report


def spread(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every figure that all reports have."""
    out: dict[str, Any] = {"seeds": len(reports)}
    for name, value in reports[0].items():
        if isinstance(value, float):
            values = [report[name] for report in reports]
            out[name], out[f"{name}_std"] = float(np.mean(values)), float(np.std(values, ddof=1))
    return out


def describe_spread(report: dict[str, Any]) -> str:
    """Each figure as mean and deviation, and the ensemble's."""
    return ", ".join(
        f"{name} {report[name]:.4g} +- {report[f'{name}_std']:.2g} (ensemble {value:.4g})"
        for name, value in report["ensemble"].items()
    )


def _claim_around(folder: Path, settings: dict[str, Any]) -> None:
    if (folder / RUN_FILE).is_file():
        return
    with atomic_write(folder / RUN_FILE) as file:
        json.dump(settings, file, indent=2)
        file.write("\n")


def _ensemble_figures(folder: Path, task: Task, config: FinetuneConfig) -> dict[str, float]:
    device = default_device()
    saved = Saved.from_pretrained(folder, device)
    # files have an encoding, models have none
    saved.task.encoding = task.encoding
    rows = saved.task.read(config.eval, lambda _: None)
    units = saved.build(rows, name="evaluation")
    raw = saved.run(units, dtype=compute_dtype(config.dtype, device))
    return saved.task.score(rows, units, raw).figures
