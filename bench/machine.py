"""What a measurement was taken on: processor, its bf16 units, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastbert.training.loop import has_fast_bf16

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "onnxruntime",
    "triton",
    "numpy",
    "tokenizers",
)
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# the widest first: the one that decides how fast a matrix product is
_CPU_CLASSES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, threads and versions, as they go into a result file."""
    cpu = cpu_fields(CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else "")
    described: dict[str, Any] = {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "cpu_class": cpu_class(cpu.get("flags", "")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fast_bf16": has_fast_bf16(device),
        "avx512_bf16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(),
        "amx": getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
        "device": device.type,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["driver"] = driver_version()
    described["system"] = platform.platform(terse=True)
    described["python"] = platform.python_version()
    described |= {name: _version(name) for name in PACKAGES}
    described["commit"] = commit()
    return described


def cpu_fields(text: str) -> dict[str, str]:
    """The first processor of /proc/cpuinfo's text, by name."""
    first = text.partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_class(flags: str) -> str:
    """The matrix unit that counts, e.g. "avx512_bf16"; the architecture where none is named."""
    present = set(flags.split())
    return next((name for name in _CPU_CLASSES if name in present), platform.machine() or "unknown")


def commit() -> str | None:
    """Of the checkout this file belongs to, "+" where files were changed; None outside of one."""
    # the links inside fastbert/ lead here as well
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    code = ("fastbert", "kernels", "bench/*.py")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return None if head is None else head + ("+" if changed else "")


def machine_class(described: dict[str, Any]) -> str:
    """The name that result files of one kind of machine share: ratios are compared within it."""
    if "gpu" in described:
        return file_name(described["gpu"])
    return f"cpu-{described['cpu_class']}"


def file_name(device: str) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def driver_version() -> str | None:
    """Of the GPU's driver, where the system tells."""
    if not DRIVER_FILE.is_file():
        return torch.version.hip
    found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER_FILE.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
