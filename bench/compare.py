"""`fastbert bench compare A.json B.json`: what changed between two runs.

Ratios to peers are compared, round by round spread beside; times only where both runs are of one
class of machine. A ratio has moved where each run's median lies outside the other's spread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.bench import machine, results
from fastbert.bench.timing import Spread

SAME, BETTER, WORSE = "same", "better", "worse"


@dataclass(frozen=True)
class Change:
    """One ratio in two runs."""

    case: str
    ours: str
    peer: str
    before: Spread
    after: Spread

    @property
    def verdict(self) -> str:
        """Whether the medians lie outside each other's spread, and on which side."""
        before, after = self.before, self.after
        if after.median < before.lowest and before.median > after.highest:
            return WORSE
        if after.median > before.highest and before.median < after.lowest:
            return BETTER
        return SAME

    def line(self) -> str:
        """For a terminal."""
        return (
            f"{self.verdict:<7} {self.case}: {self.ours} to {self.peer} "
            f"{_shown(self.before)} -> {_shown(self.after)}"
        )


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The ratios that both runs hold, in the order of the second."""
    old = _ratios(before)
    return [Change(*key, old[key], found) for key, found in _ratios(after).items() if key in old]


def missing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What the first run measured and the second did not, with the second's reason."""
    reasons = {
        (case["name"], results.label(row)): f"{row['status']}: {row['reason']}"
        for case in after["cases"]
        for row in case["rows"]
        if row["status"] != "measured"
    }
    kept = {key for case in after["cases"] for key in _measured(case)}
    return [
        f"{case}: {label}: {reasons.get((case, label), 'not in the second run')}"
        for part in before["cases"]
        for case, label in _measured(part)
        if (case, label) not in kept
    ]


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Both machines, ratios, times where they may be compared, and what is missing."""
    lines = []
    for name, run in (("A", before), ("B", after)):
        lines += [f"{name}: {run['command']}, {run['ended']}"]
        lines += [f"   {line}" for line in results.machine_lines(run["machine"])]
    found = changes(before, after)
    lines += ["", "ratios, medians (lowest..highest by round), A -> B:"]
    lines += [f"  {change.line()}" for change in found] or ["  none in both"]
    classes = [machine.machine_class(run["machine"]) for run in (before, after)]
    if classes[0] == classes[1]:
        lines += ["", "times in ms, A -> B:", *_times(before, after)]
    else:
        lines += ["", f"times are not compared: {classes[0]} and {classes[1]} are two machines"]
    lines += [f"missing {line}" for line in missing(before, after)]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print what changed; 1 where a ratio got worse by more than the spread."""
    parser = argparse.ArgumentParser(prog="fastbert bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", help="a result file of --json")
    parser.add_argument("after", help="another")
    given = parser.parse_args(arguments)
    before, after = results.read(given.before), results.read(given.after)
    print(table(before, after))
    return 1 if any(change.verdict == WORSE for change in changes(before, after)) else 0


def _ratios(run: dict[str, Any]) -> dict[tuple[str, str, str], Spread]:
    return {
        (case["name"], ratio["ours"], ratio["peer"]): Spread(**ratio["speedup"])
        for case in run["cases"]
        for ratio in case["ratios"]
    }


def _measured(case: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (case["name"], results.label(row)) for row in case["rows"] if row["status"] == "measured"
    ]


def _times(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old = {key: row["ms"]["median"] for key, row in _rows(before).items()}
    return [
        f"  {case}: {label} {old[case, label]:.4g} -> {row['ms']['median']:.4g} "
        f"({row['ms']['median'] / old[case, label] - 1:+.0%})"
        for (case, label), row in _rows(after).items()
        if (case, label) in old
    ]


def _rows(run: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (case["name"], results.label(row)): row
        for case in run["cases"]
        for row in case["rows"]
        if row["status"] == "measured"
    }


def _shown(values: Spread) -> str:
    return f"{values.median:.2f} ({values.lowest:.2f}..{values.highest:.2f})"
