"""`make gpu-test`: the tests that need a GPU and the validator; one JSON file a device.

Each test file and each operator of the validator is a process of its own, several at a time, since
most of the time goes into compiling kernels. All end at one deadline.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import gpu, machine, validate
from fastbert.bench.machine import file_name
from fastbert.errors import InputError
from fastbert.files import atomic_write

# from the start of the command: with what is left to write, all ends within nine minutes
DEADLINE_S = 500.0
MOST_AT_ONCE = 6
TIMED_OUT = 124
# files whose tests take minutes each: a process for every word that picks some
SPLIT = {"test_kernel_training.py": ("bfloat16", "float16 and not bfloat16", "not float16")}


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: of the test file or the operator.
        status: exit status; 124 where the deadline came first.
        seconds: it took.
        stdout: what it printed, errors included.
    """

    name: str
    status: int
    seconds: float
    stdout: str


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where tests and validator passed, 1 otherwise."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("gpu-test: needs a CUDA or HIP device, torch sees none")
    deadline = time.monotonic() + DEADLINE_S
    name = torch.cuda.get_device_name()
    # alone on the card, before anything else runs there
    best = gpu.ceilings()
    parts = run(commands(Path("tests")), deadline, options.at_once)
    results = [result for part in parts for result in _validated(part)]
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-test-{file_name(name)}.json"
    with atomic_write(path) as file:
        entry = {
            "machine": machine.describe(torch.device("cuda")),
            "ceilings": asdict(best),
            "parts": [{**asdict(part), "stdout": _last_lines(part)} for part in parts],
            "validator": results,
        }
        json.dump(entry, file, indent=1)
    for part in parts:
        if part.status:
            print(f"--- {part.name}\n" + "\n".join(_last_lines(part)))
    _print_worst(results)
    print(f"{name}: copy {best.copy_gb_per_s:.0f} GB/s, bf16 {best.matmul_tflop_per_s:.0f} TFLOP/s")
    for part in parts:
        last = _last_lines(part)[-1:] or [""]
        said = "" if _validated(part) else last[0]
        print(f"{part.name:<34} exit {part.status:>3} in {part.seconds:>4.0f} s  {said[:60]}")
    print(path)
    return 1 if any(part.status for part in parts) else 0


def commands(tests: Path) -> dict[str, list[str]]:
    """What is to be run, by name, the longest first.

    Args:
        tests: folder of the test files.

    Raises:
        InputError: not started in a checkout.
    """
    files = sorted(path for path in tests.glob("test_*.py") if _needs_gpu(path))
    if not files:
        raise InputError(f"gpu-test: no tests in {tests.absolute()}: start it in a checkout")
    python = [sys.executable, "-m"]
    validated = {
        f"validate {name}": [*python, "fastbert.bench", "validate", "--json", name]
        for name in validate.operators()
    }
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    split = {
        f"{path.name}: {words}": [*pytest, str(path), "-k", words]
        for path in files
        for words in SPLIT.get(path.name, ())
    }
    whole = {path.name: [*pytest, str(path)] for path in files if path.name not in SPLIT}
    return {**split, **validated, **whole}


def run(todo: dict[str, list[str]], deadline: float, at_once: int | None = None) -> list[Part]:
    """Run the commands, some at a time; none goes on after the deadline.

    Args:
        todo: commands by name.
        deadline: of time.monotonic.
        at_once: processes; as many as there are processors, six at most, where None.
    """
    at_once = at_once or min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(_part, name, todo[name], deadline) for name in todo]
        for future in concurrent.futures.as_completed(waiting):
            part = future.result()
            print(f"{part.name}: exit {part.status} in {part.seconds:.0f} s", flush=True)
        return [future.result() for future in waiting]


def _part(name: str, command: list[str], deadline: float) -> Part:
    start = time.monotonic()
    left = deadline - start
    if left <= 0:
        return Part(name, TIMED_OUT, 0.0, "not begun: the time was up")
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=left,
            check=False,
        )
        status, stdout = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        stdout = output.decode(errors="replace") if isinstance(output, bytes) else output
        status, stdout = TIMED_OUT, stdout + "\nended: the time was up"
    return Part(name, status, time.monotonic() - start, stdout)


def _needs_gpu(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return any(mark in text for mark in ("pytest.mark.gpu", "pytestmark = runs_kernels"))


def _validated(part: Part) -> list[dict[str, Any]]:
    # warnings may stand before the one line that counts
    for line in part.stdout.splitlines():
        if line.startswith('{"device"'):
            return list(json.loads(line)["results"])
    return []


def _last_lines(part: Part) -> list[str]:
    lines = part.stdout.strip().splitlines()
    return [line for line in lines if not line.startswith('{"device"')][-20:]


def _print_worst(results: list[dict[str, Any]]) -> None:
    print(f"{'operator':<22} {'dtype':<9} {'checks':>6} {'failed':>6} {'worst of bound':>14}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["operator"], result["dtype"]), []).append(result)
    for (operator, dtype), members in groups.items():
        failed = sum(not member["passed"] for member in members)
        worst = max(member["share"] for member in members)
        print(f"{operator:<22} {dtype:<9} {len(members):>6} {failed:>6} {worst:>14.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert.bench gpu-test", description=__doc__)
    parser.add_argument("--results", default="bench/results", help="folder (%(default)s)")
    parser.add_argument("--at-once", type=int, help="processes (one a processor, at most 6)")
    return parser
