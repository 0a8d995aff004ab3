"""What this machine has, and which path fastbert takes on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

import torch

from fastbert import __version__
from fastbert.training.loop import compute_dtype, default_device, describe_path, has_fast_bf16

_PACKAGES = ("numpy", "tokenizers", "safetensors", "triton", "transformers", "matplotlib")


def diagnose() -> list[str]:
    """One fact a line: versions, devices, the path that runs and why, the compiler."""
    device = default_device()
    lines = [
        f"fastbert       {__version__}",
        f"python         {platform.python_version()} ({sys.executable})",
        f"system         {platform.system()} {platform.machine()}",
        f"torch          {torch.__version__}",
        *(f"{name:<14} {_version(name)}" for name in _PACKAGES),
        f"cpu            {_cpu_name()}, {os.cpu_count()} cores, torch uses "
        f"{torch.get_num_threads()} threads",
        f"cpu bf16       {_cpu_bf16()}",
        *_gpus(),
        f"compiler       {_compiler()}",
        f"device         {device}",
        f"path           {describe_path(device)}",
        f"--dtype auto   {str(compute_dtype('auto', device)).removeprefix('torch.')}",
    ]
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _cpu_bf16() -> str:
    if has_fast_bf16(torch.device("cpu")):
        return "yes (avx512_bf16 or AMX): matrix products in bf16 are faster than in fp32"
    return "no avx512_bf16 or AMX: fp32 is used"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["gpu            none that torch can use"]
    kind = "ROCm" if torch.version.hip else "CUDA"
    return [
        f"gpu {index}          {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB ({kind})"
        for index in range(torch.cuda.device_count())
    ]


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    return "none (torch.compile and Triton need one; fastbert on a CPU does not)"
