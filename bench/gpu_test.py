"""`make gpu-test`: the tests that need a GPU and the validator; one JSON file a device."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import gpu, machine
from fastbert.bench.kernels import file_name
from fastbert.errors import InputError
from fastbert.files import atomic_write

# together they end within nine minutes
TESTS_LIMIT_S, VALIDATOR_LIMIT_S = 200, 310


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where tests and validator passed, 1 otherwise."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("gpu-test: needs a CUDA or HIP device, torch sees none")
    name = torch.cuda.get_device_name()
    best = gpu.ceilings()
    python = [sys.executable, "-m"]
    tests = _part("tests", [*python, "pytest", "-q", "-m", "gpu", "tests"], TESTS_LIMIT_S)
    command = [*python, "fastbert.bench", "validate", "--json"]
    validator = _part("validator", command, VALIDATOR_LIMIT_S)
    results = _validated(validator.pop("stdout"))
    tests["last_lines"] = tests.pop("stdout").strip().splitlines()[-20:]
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-test-{file_name(name)}.json"
    with atomic_write(path) as file:
        entry = {
            "machine": machine.describe(torch.device("cuda")),
            "ceilings": vars(best),
            "tests": tests,
            "validator": {**validator, "results": results},
        }
        json.dump(entry, file, indent=1)
    print("\n".join(tests["last_lines"]))
    _print_worst(results)
    print(f"{name}: copy {best.copy_gb_per_s:.0f} GB/s, bf16 {best.matmul_tflop_per_s:.0f} TFLOP/s")
    for part in (tests, validator):
        print(f"{part['name']:<10} exit {part['status']} in {part['seconds']:.0f} s")
    print(path)
    return 0 if tests["status"] == validator["status"] == 0 else 1


def _part(name: str, command: list[str], limit_s: float) -> dict[str, Any]:
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=limit_s, check=False
        )
        status, stdout = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        stdout = output.decode(errors="replace") if isinstance(output, bytes) else output
        status = 124
    seconds = time.monotonic() - start
    return {"name": name, "status": status, "seconds": seconds, "stdout": stdout}


def _validated(printed: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads(printed)["results"])
    except (json.JSONDecodeError, KeyError):
        return []


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
    return parser
