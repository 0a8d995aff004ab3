"""Results of `fastbert bench tasks`: gathered from the runs, kept as JSON, shown as a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.bench.task_cases import CASES, TaskCase
from fastbert.bench.task_speed import OURS, THEIRS
from fastbert.bench.timing import speedup
from fastbert.errors import InputError
from fastbert.files import atomic_write

# what a run's folder holds: results by stage, with the seed behind where there is one
STAGES = ("fastbert", "speed", "trainer")
Results = dict[str, dict[str, Any]]


def result_path(runs: Path, case: TaskCase, stage: str, seed: int | None = None) -> Path:
    """Where a measurement is kept, so that a bench that was stopped does not take it again."""
    return runs / case.name / (f"{stage}.json" if seed is None else f"{stage}-{seed}.json")


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def read_results(path: Path) -> Results:
    """What a results file says; nothing where there is none.

    Raises:
        InputError: no results file.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = content["cases"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: no results of `fastbert bench tasks`") from None
    return dict(cases)


def gather(runs: Path, known: Results) -> Results:
    """Results by case and stage: those of the runs, and those known of what they lack.

    Args:
        runs: folder of the runs.
        known: results of an earlier bench.
    """
    found: Results = {}
    for case in CASES:
        stages = dict(known.get(case.name, {}))
        for stage in STAGES:
            one = result_path(runs, case, stage)
            listed = sorted((runs / case.name).glob(f"{stage}-*.json"), key=lambda p: _seed(p))
            if one.is_file():
                stages[stage] = json.loads(one.read_text(encoding="utf-8"))
            elif listed:
                stages[stage] = [json.loads(path.read_text(encoding="utf-8")) for path in listed]
        if stages:
            found[case.name] = stages
    return found


def _seed(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def table(results: Results, model: str, install: str | None = None) -> str:
    """The page, in Markdown.

    Args:
        results: of `gather`.
        model: that the runs started from.
        install: what a Trainer that is not there needs.
    """
    lines = [
        "# What fine-tuning reaches",
        "",
        "Written by `fastbert bench tasks`, which goes on where it was stopped. Every row is "
        f"`fastbert finetune` from {model}, bf16; figures are of the split named, in percent; "
        "mean and sample deviation where several seeds were run.",
        "",
        "| case | task | split | fastbert | goal | epochs | rows | training, s |",
        "|---|---|---|---|---|---|---|---|",
        *(_case_row(case, results.get(case.name, {})) for case in CASES),
        "",
        "## Beside transformers' Trainer",
        "",
        "The same checkpoint, token ids, epochs, batch size, peak learning rate, warm-up, dropout "
        "and dtype; the Trainer pads each batch to its longest row. Questions are cut into windows "
        "and answers put together as in transformers' run_qa recipe, whose default, padding to the "
        "full length, would be slower. Both models are scored by the same code. Times are medians "
        "over the seeds; a run that was paused for other work on the machine has none.",
        "",
        "| case | figure | fastbert | Trainer | training, s | Trainer's, s |",
        "|---|---|---|---|---|---|",
        *_peer_rows(results, install),
        "",
        "## Examples a second",
        "",
        "Whole training loops in turn, in one run, from the same weights, after their outputs were "
        "found equal by the error rule; median of the rounds, and the lowest and highest ratio "
        "within one. The Trainer takes rows in random order, its default, and pads each batch to "
        "its longest row.",
        "",
        "| case | tokens a row | padding | fastbert | Trainer | ratio |",
        "|---|---|---|---|---|---|",
        *_speed_rows(results, install),
        "",
        *_machines(results),
        *_loads(results),
        "",
    ]
    return "\n".join(lines)


def _case_row(case: TaskCase, stages: dict[str, Any]) -> str:
    runs = stages.get("fastbert", [])
    head = f"| {case.name} | {case.task} | {case.split} |"
    if not runs:
        return f"{head} not measured | {case.goal} | | | |"
    shown = [f"{name} {percent(runs, name)}" for name in case.shown]
    for title, key in (("before", "before"), ("BM25", "bm25")):
        known = runs[0].get(key, {})
        shown += [f"({title}: {n} {100 * v:.1f})" for n, v in known.items() if n in case.shown]
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return (
        f"{head} {', '.join(shown)}{seeds} | {case.goal} | {runs[0]['epochs']:g} | "
        f"{runs[0]['rows']:,} | {_seconds(runs)} |"
    )


def percent(runs: Sequence[dict[str, Any]], name: str) -> str:
    """A figure of one run, or mean and deviation of several."""
    values = [100 * run["figures"][name] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _seconds(runs: Sequence[dict[str, Any]]) -> str:
    """The median time of the runs that have one: that of a run that was stopped for a while
    (SIGSTOP) says nothing, and who stopped it marks its result `"paused": true`."""
    times = [run["seconds"] for run in runs if not run.get("paused")]
    return f"{statistics.median(times):,.0f}" if times else "paused"


def _peer_rows(results: Results, install: str | None) -> list[str]:
    rows = []
    for case in CASES:
        stages = results.get(case.name, {})
        if not case.peer:
            continue
        ours, theirs = stages.get("fastbert", []), stages.get("trainer", [])
        if not ours or not theirs:
            rows.append(f"| {case.name} | {install or 'not measured'} | | | | |")
            continue
        for name in case.shown:
            rows.append(
                f"| {case.name} | {name} | {percent(ours, name)} | {percent(theirs, name)} | "
                f"{_seconds(ours)} | {_seconds(theirs)} |"
            )
    return rows


def _speed_rows(results: Results, install: str | None) -> list[str]:
    rows = []
    for case in CASES:
        found = results.get(case.name, {}).get("speed")
        if not case.peer:
            continue
        if found is None:
            rows.append(f"| {case.name} | {install or 'not measured'} | | | | |")
            continue
        seconds, count = found["seconds"], found["examples"]
        rates = {name: count / statistics.median(taken) for name, taken in seconds.items()}
        ratio = speedup(seconds[THEIRS], seconds[OURS])
        rows.append(
            f"| {case.name} | {found['tokens'] / count:.0f} | {found['padding']:.0%} | "
            f"{rates[OURS]:,.0f} | {rates[THEIRS]:,.0f} | "
            f"{ratio.median:.1f} ({ratio.lowest:.1f} to {ratio.highest:.1f}) |"
        )
    return rows


def _machines(results: Results) -> list[str]:
    machines = set()
    for stages in results.values():
        for stage in STAGES:
            found = stages.get(stage, [])
            for run in [found] if isinstance(found, dict) else found:
                machines.add(machine_line(run["machine"]))
    return sorted(machines)


def _loads(results: Results) -> list[str]:
    """Where other work slowed the runs, for how much of it there was."""
    found = []
    for name, stages in results.items():
        for stage in STAGES:
            runs = stages.get(stage, [])
            for run in [runs] if isinstance(runs, dict) else runs:
                # a run's own threads count as well
                spare = (run.get("load") or 0.0) - run["machine"]["threads"]
                if spare > 1.0:
                    found.append(f"{name} ({stage}) {run['load']:g}")
    if not found:
        return []
    return [
        "",
        "Other programs ran beside, and times are longer than they would be alone; load averages "
        f"at the end: {', '.join(found)}.",
    ]


def machine_line(machine: dict[str, Any]) -> str:
    """What was measured on, in one line."""
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}, commit {machine['commit']}."
    )
