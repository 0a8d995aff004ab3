"""`make bench-check`: the committed runs of this class of machine, measured again; ratios alone.

Each result file of bench/results that has this machine's class is run anew with its own flags. A
ratio is worse where each run's median lies outside the other's spread; 1 where one is.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import compare, machine, results
from fastbert.bench.figures import RESULTS, ROOT
from fastbert.errors import InputError

# suites that compare nothing but our own variants, or take minutes a point
LEFT_OUT = {"breakdown", "sweep"}


def committed(folder: Path, of_class: str) -> dict[str, dict[str, Any]]:
    """The registry's result files of one class of machine, by suite."""
    found = {}
    for path in sorted(folder.glob(f"*-{of_class}.json")):
        try:
            run = results.read(path)
        except InputError:
            # some suites write a form of their own, which has no ratios to hold to
            continue
        if run["bench"] not in LEFT_OUT:
            found[run["bench"]] = run
    return found


def again(run: dict[str, Any]) -> dict[str, Any]:
    """The same suite with the same flags, now."""
    from fastbert.bench.__main__ import COMMANDS

    module = importlib.import_module(COMMANDS[run["bench"]][0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        module.main([*run["arguments"], "--json", str(file)])
        return results.read(file)


def judge(
    runs: dict[str, dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Any]] = again,
    say: Callable[[str], None] = print,
) -> int:
    """1 where a ratio got worse by more than the spread, or a row of ours is gone."""
    worse = 0
    for suite, before in runs.items():
        after = measure(before)
        changes = compare.changes(before, after)
        red = [change.line() for change in changes if change.verdict == compare.WORSE]
        red += [line for line in compare.missing(before, after) if ": fastbert " in line]
        worse += bool(red)
        say(f"{suite}: {len(changes)} ratios, {len(red)} worse than {before['machine']['commit']}")
        for line in red:
            say(f"  {line}")
    return 1 if worse else 0


def main(arguments: Sequence[str]) -> int:
    """Measure again and compare."""
    parser = argparse.ArgumentParser(prog="fastbert bench check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", action="append", help="repeatable (all that are committed)")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_class = machine.machine_class(machine.describe(device))
    runs = committed(ROOT / RESULTS, of_class)
    if not runs:
        raise InputError(f"bench check: no result of {of_class} in {RESULTS}: commit one first")
    for name in given.suite or ():
        if name not in runs:
            raise InputError(f"--suite {name}: committed for {of_class} are {', '.join(runs)}")
    return judge({name: runs[name] for name in given.suite or runs})
