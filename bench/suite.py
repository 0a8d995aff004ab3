"""What every suite's command shares: flags, threads, measuring, table, file, exit status."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import ceilings, results
from fastbert.bench.providers import BF16, missing
from fastbert.bench.registry import OURS, REFUSED, Case, Timer, measure
from fastbert.bench.timing import interleaved_ms
from fastbert.errors import InputError

QUICK_REPEATS = 3
AddFlags = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Suite:
    """One sub-command of `fastbert bench`.

    Attributes:
        name: of the command.
        about: its help text.
        cases: the comparisons, from the parsed flags and the device; made one by one, so that a
            case's models are gone before the next one's come.
        repeats: rounds that count, unless told otherwise.
        add_flags: of its own.
        timer: how steps are timed there; None for the clock around interleaved steps.
    """

    name: str
    about: str
    cases: Callable[[argparse.Namespace, torch.device], Iterator[Case]]
    repeats: int = 9
    warm_up: int = 2
    add_flags: AddFlags = field(default=lambda parser: None)
    timer: Callable[[int, int, torch.device], Timer] | None = None

    def main(self, arguments: Sequence[str]) -> int:
        """0 measured, 1 where a row of ours was refused or none was measured."""
        options = self.parser().parse_args(arguments)
        if options.json is not None and not options.json.parent.is_dir():
            raise InputError(f"--json {options.json}: no such folder {options.json.parent}")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with threads(options.threads):
            found = self.run(options, arguments, say=_to_stderr)
        print(results.table(found))
        return status(found)

    def run(
        self,
        options: argparse.Namespace,
        arguments: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
        device: torch.device | None = None,
    ) -> dict[str, Any]:
        """All cases, as they go into the result file."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        repeats = options.repeats = options.repeats or (
            QUICK_REPEATS if options.quick else self.repeats
        )
        warm_up = 1 if options.quick else self.warm_up
        dtypes = ["fp32"] if missing([BF16], device) else ["fp32", "bf16"]
        say("the machine's ceilings")
        best = ceilings.measure(device, dtypes)
        timer = (self.timer or by_the_clock)(repeats, warm_up, device)
        found = results.result(
            self.name,
            device=device,
            ceilings=best,
            arguments=_without_file(arguments),
            repeats=repeats,
        )
        for case in self.cases(options, device):
            results.add(found, measure(case, timer, device, best, say))
            if options.json is not None:
                # after every case: what was measured stays, whatever ends the run
                results.write(options.json, found)
        return found

    def parser(self) -> argparse.ArgumentParser:
        """Of the flags that all suites share, and its own."""
        parser = argparse.ArgumentParser(prog=f"fastbert bench {self.name}", description=self.about)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
        parser.add_argument(
            "--repeats",
            type=positive,
            help=f"rounds that count ({self.repeats}; {QUICK_REPEATS} with --quick)",
        )
        parser.add_argument("--threads", type=positive, default=2, help="of torch (%(default)s)")
        parser.add_argument(
            "--quick",
            action="store_true",
            help=f"fewer cases, {QUICK_REPEATS} rounds unless told: a look, not a result",
        )
        self.add_flags(parser)
        return parser


def by_the_clock(repeats: int, warm_up: int, device: torch.device) -> Timer:
    """Interleaved steps under the host's clock, the device idle before and after each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    return functools.partial(interleaved_ms, repeats=repeats, warm_up=warm_up, synchronise=wait)


def status(found: dict[str, Any]) -> int:
    """Exit status of a run: 1 where a row of ours was refused, or nothing was measured."""
    rows = [row for case in found["cases"] for row in case["rows"]]
    refused = any(row["status"] == REFUSED and row["provider"].startswith(OURS) for row in rows)
    return 1 if refused or not any(row["status"] == "measured" for row in rows) else 0


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads of torch inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _without_file(arguments: Sequence[str]) -> list[str]:
    """The flags that decide what was measured."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if not skip and word != "--json" and not word.startswith("--json="):
            kept.append(word)
        skip = word == "--json"
    return kept
