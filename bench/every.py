"""`fastbert bench all`: every suite in turn, a result file each, and one page that gathers them.

A suite that cannot run here is skipped by name, with the reason. `--quick` ends within two minutes
on two cores; what takes longer even then is skipped by name too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastbert.bench import results
from fastbert.bench.page import write_page
from fastbert.bench.providers import BENCH_EXTRA, installed
from fastbert.bench.public_model import WIKIPEDIA, data_file, default_model
from fastbert.errors import InputError

OUT = "runs/bench"


@dataclass(frozen=True)
class Part:
    """One suite of the run.

    Attributes:
        name: of the suite and its file.
        module: whose `main` takes the words.
        words: its flags; None where what it needs is missing.
        quick_words: the same for a quick look; None where it takes too long.
        needs_gpu: skipped without one.
        names_its_file: takes a folder and names the file in it by the device.
        why: it is not run, where `words` or `quick_words` is None.
    """

    name: str
    module: str
    words: Sequence[str] | None = ()
    quick_words: Sequence[str] | None = ("--quick",)
    needs_gpu: bool = False
    names_its_file: bool = False
    why: str = "takes minutes even at its smallest; run it by name"


def parts() -> list[Part]:
    """All suites, those first that a newcomer looks at first."""
    quick_step = ("--quick", "--sequences", "8")
    found = [Part("train-step", "fastbert.bench.train_step", quick_words=quick_step)]
    for name in ("encode", "layer", "packing", "pretrain", "finetune"):
        found.append(Part(name, f"fastbert.bench.{name}"))
    for name in ("kernels", "ablation", "breakdown", "sweep"):
        found.append(Part(name, f"fastbert.bench.{name}", quick_words=None))
    # its rows are encode's, on padded batches that came from elsewhere
    found.append(Part("drop-in", "fastbert.bench.drop_in", quick_words=None))
    found.append(_loader())
    found.append(Part("tasks", "fastbert.bench.tasks", None, None, why="hours; run it by name"))
    found += [
        Part("attention", "fastbert.bench.attention", quick_words=None, names_its_file=True),
        Part(
            "gpu-step",
            "fastbert.bench.gpu_step",
            quick_words=None,
            needs_gpu=True,
            names_its_file=True,
        ),
    ]
    return found


def run(
    chosen: Sequence[Part],
    folder: Path,
    *,
    quick: bool,
    say: Callable[[str], None] = print,
) -> int:
    """Run them; 0 where none was red.

    Args:
        chosen: in this order.
        folder: for the result files.
        quick: smallest cases.
        say: told of every suite, with what was skipped and why.
    """
    red = []
    for part in chosen:
        words = part.quick_words if quick else part.words
        if part.needs_gpu and not torch.cuda.is_available():
            say(f"{part.name}: skipped, needs a GPU")
            continue
        if words is None:
            say(f"{part.name}: skipped, {part.why}")
            continue
        say(f"\n== {part.name}")
        started = time.monotonic()
        try:
            code = importlib.import_module(part.module).main([*words, *written(part, folder)])
        except InputError as error:
            say(f"{part.name}: skipped, {error}")
            continue
        if code:
            red.append(part.name)
        say(f"{part.name}: {time.monotonic() - started:.0f} s")
    if red:
        say(f"red rows in {', '.join(red)}")
    return 1 if red else 0


def written(part: Part, folder: Path) -> tuple[str, str]:
    """The flag by which the part leaves its result in the folder."""
    if part.names_its_file:
        return "--results", str(folder)
    return "--json", str(folder / f"{part.name}.json")


def _loader() -> Part:
    text = data_file(WIKIPEDIA)
    module = "fastbert.bench.loader"
    try:
        model = default_model()
    except InputError as error:
        return Part("loader", module, None, None, why=str(error))
    if text is None:
        why = f"no {WIKIPEDIA} among the data sets; FASTBERT_DATA names their folder"
        return Part("loader", module, None, None, why=why)
    words = (str(text), "--tokenizer", model)
    return Part("loader", module, words, None)


def main(arguments: Sequence[str]) -> int:
    """0 where all that can run here was measured and nothing was red."""
    parser = argparse.ArgumentParser(prog="fastbert bench all", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path(OUT), help="folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="within two minutes; no result")
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        raise InputError(f"--out {given.out}: is no folder")
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code = run(parts(), given.out, quick=given.quick)
    runs = []
    for part in parts():
        with contextlib.suppress(InputError):
            # a suite that was skipped has no file, some have a form of their own
            runs.append(results.read(given.out / f"{part.name}.json"))
    if installed("matplotlib"):
        print(f"{write_page(runs, given.out)}: charts and tables of {len(runs)} suites")
    else:
        print(f"no page: charts need matplotlib: {BENCH_EXTRA}")
    print(f"{given.out}: all results, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return code
