"""What Triton's interpreter gets wrong about bf16, put right for tests on a CPU.

It keeps bf16 as uint16: casts from fp32 truncate where hardware rounds to nearest even, products
multiply the bit patterns, and arithmetic works on them as on integers. Casts and products are
repaired; arithmetic raises, since a kernel must widen to fp32 first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fma")


def round_to_bf16(values: Any) -> Any:
    """An fp32 array to bf16 bit patterns (uint16), to nearest, ties to even."""
    rounded = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view("uint16")


def widen_bf16(patterns: Any) -> Any:
    """bf16 bit patterns (uint16) to an fp32 array."""
    return (patterns.astype("uint32") << 16).view("float32")


def repair() -> None:
    """Put the interpreter right; calling it again changes nothing."""
    builder = InterpreterBuilder
    if getattr(builder, "_fastbert_repaired", False):
        return
    builder._fastbert_repaired = True
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        scalars = source.dtype.scalar, target.scalar
        if scalars == (tl.float32, tl.bfloat16):
            return TensorHandle(round_to_bf16(source.data), tl.bfloat16)
        if scalars == (tl.bfloat16, tl.float32):
            return TensorHandle(widen_bf16(source.data), tl.float32)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (_widened(operand) for operand in (a, b))
        return dot(self, a, b, *rest)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in _ARITHMETIC:
        setattr(builder, name, _refusing_bf16(name, getattr(builder, name)))


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return TensorHandle(widen_bf16(operand.data), tl.float32)


def _refusing_bf16(name: str, method: Any) -> Any:
    def checked(self: Any, *operands: Any) -> Any:
        if any(
            getattr(o, "dtype", None) is not None and o.dtype.scalar == tl.bfloat16
            for o in operands
        ):
            raise TypeError(f"{name}: bf16 arithmetic means nothing here: widen to fp32 first")
        return method(self, *operands)

    return checked
