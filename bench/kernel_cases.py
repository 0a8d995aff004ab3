"""The launches that ship: every kernel, variant and size that the compile matrix compiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.bench import attention_cases, head_cases
from fastbert.bench.compile_matrix import Case

WIDTHS = (32, 128, 384, 768, 1024, 1000, 2048, 4096, 5000, 8192)
INTERMEDIATE = (512, 1152, 3072, 4096)
# every variant is compiled at this width; the others take the one that needs most registers
BASE = 768
NORM_VARIANTS = ("dropout", "sum", "residual", "bare")
ACTIVATION_VARIANTS = ("gelu", "gelu_new", "gated")
ROWS = 16384
DROPOUT = 0.1


def cases() -> list[Case]:
    """Every shipped kernel in every variant; the quick ones are marked."""
    found = attention_cases.cases() + head_cases.cases()
    for width in WIDTHS:
        for variant in NORM_VARIANTS if width == BASE else NORM_VARIANTS[:1]:
            quick = width == BASE and variant == NORM_VARIANTS[0]
            found.append(Case("layer_norm_fwd", variant, width, _norm_fwd(width, variant), quick))
            # the widest take a kernel of their own
            quick = quick or width == WIDTHS[-1]
            found.append(Case("layer_norm_bwd", variant, width, _norm_bwd(width, variant), quick))
        quick = width == BASE
        found.append(Case("dropout", "dropout", width, _dropout(width), quick))
    for width in INTERMEDIATE:
        wide = width == 4 * BASE
        for variant in ACTIVATION_VARIANTS if wide else ACTIVATION_VARIANTS[:1]:
            quick = wide and variant == ACTIVATION_VARIANTS[0]
            forward, backward = _activation_fwd(width, variant), _activation_bwd(width, variant)
            found.append(Case("bias_activation_fwd", variant, width, forward, quick))
            found.append(Case("bias_activation_bwd", variant, width, backward, quick))
        found.append(Case("linear_activation", "gelu", width, _linear_activation(width), wide))
    return found


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _draw(variant: str) -> dict[str, Any]:
    drops = variant == "dropout"
    ids = _meta(ROWS, dtype=torch.int32) if drops else None
    return {
        "state": _meta(3, dtype=torch.int64) if drops else None,
        "sequence_ids": ids,
        "positions": ids,
        "layer": 1,
        "site": 1,
        "dropout_p": DROPOUT if drops else 0.0,
    }


def _dropout(width: int) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.dropout import dropout_rows

        dropout_rows(_meta(ROWS, width, dtype=dtype), **_draw("dropout"))

    return call


def _norm_fwd(width: int, variant: str) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.layer_norm import layer_norm_fwd

        x, vector = _meta(ROWS, width, dtype=dtype), _meta(width, dtype=torch.float32)
        bare = variant == "bare"
        layer_norm_fwd(
            x,
            None if bare else vector,
            None if bare else x,
            vector,
            vector,
            **_draw(variant),
            eps=1e-12,
            dtype=dtype,
            wants_total=variant == "sum",
            wants_statistics=True,
        )

    return call


def _norm_bwd(width: int, variant: str) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.layer_norm import layer_norm_bwd

        x, vector = _meta(ROWS, width, dtype=dtype), _meta(width, dtype=torch.float32)
        statistic = _meta(ROWS, dtype=torch.float32)
        total = variant == "sum"
        parts = variant in ("residual", "dropout")
        layer_norm_bwd(
            x,
            x if total else None,
            x,
            vector if parts else None,
            x if parts else None,
            vector,
            statistic,
            statistic,
            **_draw(variant),
            x_is_total=total,
            wants_x_bias=variant != "bare",
            dx_dtype=dtype,
            dresidual_dtype=dtype if variant == "dropout" else None,
        )

    return call


def _activation_fwd(width: int, variant: str) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.feed_forward import bias_activation_fwd

        pre, bias, activation, gated = _pre_activation(width, variant, dtype)
        bias_activation_fwd(pre, bias, activation, gated)

    return call


def _activation_bwd(width: int, variant: str) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.feed_forward import bias_activation_bwd

        pre, bias, activation, gated = _pre_activation(width, variant, dtype)
        bias_activation_bwd(_meta(ROWS, width, dtype=dtype), pre, bias, activation, gated)

    return call


def _pre_activation(width: int, variant: str, dtype: torch.dtype) -> tuple[Any, ...]:
    gated = variant == "gated"
    wide = 2 * width if gated else width
    activation = "gelu_new" if variant == "gelu_new" else "gelu"
    return _meta(ROWS, wide, dtype=dtype), _meta(wide, dtype=torch.float32), activation, gated


def _linear_activation(width: int) -> Any:
    def call(dtype: torch.dtype) -> None:
        from fastbert.kernels.feed_forward import linear_activation

        depth = width // 4
        x, weight = _meta(ROWS, depth, dtype=dtype), _meta(width, depth, dtype=dtype)
        linear_activation(x, weight, _meta(width, dtype=torch.float32), "gelu", True)

    return call
