"""`fastbert bench gates`: what can be held to a committed figure without a clock.

- kernels a layer launches, counted under Triton's interpreter
- bytes a layer keeps for its backward pass, a token, beside transformers'
- packing efficiency over the named distributions of lengths
- registers and shared memory of every kernel in the quick compile matrix

What is more than bench/results/gates.json says, or less full, is named and the exit status is 1.
`--write` makes the file anew. Import time has a test of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench import compile_matrix, kernel_cases
from fastbert.bench.distributions import NAMED, lengths_of
from fastbert.bench.packing import fullness
from fastbert.bench.providers import installed
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.packing import best_fit

FILE = Path(__file__).resolve().parent / "results" / "gates.json"
PACKED_SEQUENCES, BUDGET = 4000, 16384
COMPILED = "compiled"
SIZE = "mini"


def resources(rows: Iterable[compile_matrix.Row]) -> dict[str, list[int]]:
    """Registers a thread and shared bytes a program, by kernel, dtype and architecture."""
    return {
        f"{row.case} {row.dtype} {row.architecture}": [row.registers, row.shared_bytes]
        for row in sorted(rows, key=lambda row: (row.case, row.dtype, row.architecture))
    }


def grown(before: dict[str, list[int]], after: dict[str, list[int]]) -> list[str]:
    """A line for each kernel that takes more than the table says, or is not in it."""
    lines = []
    for name, found in after.items():
        if name not in before:
            lines.append(f"{name}: not in the table; bench gates --write takes it up")
            continue
        for what, old, new in zip(("registers", "shared bytes"), before[name], found, strict=True):
            if new > old:
                lines.append(f"{name}: {new} {what}, {old} committed")
    return lines


def packing() -> dict[str, float]:
    """Percent of the room that is real tokens, by distribution."""
    found = {}
    for name in NAMED:
        lengths = lengths_of(name, PACKED_SEQUENCES)
        full = fullness(lengths, best_fit(lengths, BUDGET), BUDGET)
        found[name] = round(100 * full, 3)
    return found


def saved_bytes() -> dict[str, float]:
    """Bytes a token and layer of a small BERT by program, ours by the kernels' path."""
    return dict(_interpreted("activations", "--size", SIZE, "--json"))


def layer_kernels() -> dict[str, int]:
    """Kernels a layer launches, by direction."""
    return {way: len(names) for way, names in _interpreted("attention", "--count").items()}


def _interpreted(*words: str) -> dict[str, Any]:
    # the interpreter takes the compiler's place when triton is imported, and stays there
    command = [sys.executable, "-m", "fastbert.bench", *words]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("FASTBERT_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"bench gates: {' '.join(words)} failed: {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def failures(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for everything that got worse than the committed figures.

    Args:
        before: of the file.
        after: found now; what is not in it was not looked at.
    """
    lines = []
    for way, count in after.get("kernels_a_layer", {}).items():
        old = before["kernels_a_layer"][way]
        if count > old:
            lines.append(f"a layer launches {count} kernels {way}, {old} committed")
    for program, count in after.get("saved_bytes", {}).items():
        old = before["saved_bytes"][program]
        # transformers' own figure is there for the ratio
        if program.startswith("fastbert") and count > old:
            lines.append(f"{program}: a layer keeps {count:.0f} bytes a token, {old:.0f} committed")
    for name, full in after.get("packing_full_percent", {}).items():
        old = before["packing_full_percent"][name]
        if full < old:
            lines.append(f"packing of {name}: {full} % full, {old} % committed")
    if COMPILED in after:
        lines += compiled_failures(before[COMPILED], after[COMPILED])
    return lines


def compiled_failures(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Growth of registers and shared memory; none where another compiler made the table."""
    if before["triton"] != after["triton"]:
        return []
    return grown(before["rows"], after["rows"])


def compiled(rows: Iterable[compile_matrix.Row]) -> dict[str, Any]:
    """Resources with the compiler that they are of."""
    import triton

    return {"triton": triton.__version__, "rows": resources(rows)}


def measure(say: Any = print) -> dict[str, Any]:
    """All gates' figures."""
    found: dict[str, Any] = {"packing_full_percent": packing()}
    if not installed("triton"):
        say("kernels: skipped, triton is absent")
        return found
    if installed("transformers"):
        found["saved_bytes"] = saved_bytes()
    else:
        say("bytes a layer keeps: skipped, transformers is absent")
    found["kernels_a_layer"] = layer_kernels()
    todo = compile_matrix.jobs(kernel_cases.cases(), quick=True)
    say(f"{len(todo)} compilations of the quick matrix; those made before are kept")
    found[COMPILED] = compiled(compile_matrix.run(todo))
    return found


def read(path: Path = FILE) -> dict[str, Any]:
    """The committed figures.

    Raises:
        InputError: there are none.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None


def main(arguments: Sequence[str]) -> int:
    """0 where nothing got worse."""
    parser = argparse.ArgumentParser(prog="fastbert bench gates", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="take what is found as the figures")
    given = parser.parse_args(arguments)
    found = measure()
    if given.write:
        with atomic_write(FILE) as file:
            text = json.dumps(found, indent=1)
            # a kernel is a line
            file.write(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
        print(FILE)
        return 0
    before = read()
    if COMPILED in found and before[COMPILED]["triton"] != found[COMPILED]["triton"]:
        print(f"registers: not compared, the table is of triton {before[COMPILED]['triton']}")
    lines = failures(before, found)
    print("\n".join(lines) or "nothing got worse")
    return 1 if lines else 0
