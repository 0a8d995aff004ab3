"""`make gpu-bench`: the training step and every kernel beside their peers, within nine minutes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastbert.bench import gpu_test
from fastbert.bench.machine import file_name
from fastbert.errors import InputError

STEP_S, KERNELS_S, MASKED_LM_S = 230.0, 245.0, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all were measured, 1 otherwise."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("gpu-bench: needs a CUDA or HIP device, torch sees none")
    status = 0
    printed = []
    Path(options.results).mkdir(parents=True, exist_ok=True)
    folder = ["--results", options.results]
    name = file_name(torch.cuda.get_device_name())
    kernels = str(Path(options.results) / f"kernels-{name}.json")
    for name, limit_s, words in (
        ("gpu-step", STEP_S, ["gpu-step", *folder]),
        ("kernels", KERNELS_S, ["kernels", "--autotune", "--repeats", "3", "--json", kernels]),
        ("masked-lm", MASKED_LM_S, ["masked-lm", *folder]),
    ):
        command = [sys.executable, "-m", "fastbert.bench", *words]
        # one after the other: each has the card to itself
        (part,) = gpu_test.run({name: command}, time.monotonic() + limit_s, at_once=1)
        printed.append(part.stdout.strip())
        status = status or part.status
    print("\n".join(printed))
    return 1 if status else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert.bench gpu-bench", description=__doc__)
    parser.add_argument("--results", default="bench/results", help="folder (%(default)s)")
    return parser
