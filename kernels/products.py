"""Matrix products of linear layers: on CPUs by oneDNN, where torch would take a slower library.

    y = x W' + b        dx = dy W        dW = dy' x        db = sum of dy's rows

torch multiplies in fp32 with MKL, which keeps its widest instructions for processors of its maker;
in 16 bits it writes a bias into the result before the product and reads it back. oneDNN is inside
torch too, takes the widest instructions of any processor, and adds bias and GELU on the way out.
It would add up all fp32 terms of a number in one chain, with larger errors than MKL's: chains are
cut here to the length of MKL's. Everywhere else a product is torch's own.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastbert.kernels import launch
from fastbert.kernels.checks import compute_dtype, no_autocast, wants_gradient

CPU_INFO = Path("/proc/cpuinfo")
# fp32 terms added up in one chain, as many as MKL adds: errors are then the same as torch's
MOST_TERMS = 192
# above so many elements, turning a gradient round costs more than the better order of its product
MOST_TURNED = 1 << 22
_PLAIN = (Tensor, nn.Parameter)
_CAST = (torch.float32, torch.float16, torch.bfloat16)
GELU = {"gelu": "none", "gelu_new": "tanh"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, differentiable.

    Args:
        x: [..., in]; the result is [..., out] in its dtype, or the autocast dtype.
        weight: [out, in]; bias: [out].

    Raises:
        RuntimeError: torch's own, for shapes and dtypes that do not fit.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    if not (_takes(x, dtype, bias is not None) and _fit(x, weight, bias)):
        return F.linear(x, weight, bias)
    with no_autocast(x):
        return _apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """GELU(x W' + b), differentiable; one pass over the result where no gradient is asked for."""
    if wants_gradient(x, weight, bias) or torch.compiler.is_compiling():
        return F.gelu(linear(x, weight, bias), approximate=GELU[activation])
    plain = not torch.is_autocast_enabled(x.device.type)
    whole = x.dtype != torch.float32 or x.shape[-1] <= MOST_TERMS
    if plain and whole and _takes(x, x.dtype, True) and _fit(x, weight, bias):
        return _onednn(x, weight, bias, "gelu", GELU[activation])
    # nobody else holds the product
    return torch._C._nn.gelu_(linear(x, weight, bias), approximate=GELU[activation])  # type: ignore


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """[rows, out] times [out, in], differentiable by torch's own product."""
    if wants_gradient(gradient, weight) or not _takes_gradient(gradient):
        return gradient @ weight
    return _product(gradient, weight.t(), None)


def weight_gradient(gradient: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """scale times [rows, out]' times [rows, in], differentiable by torch's own product."""
    if wants_gradient(gradient, x):
        return gradient.t() @ x * scale
    if not _takes_gradient(gradient):
        product = gradient.new_empty(gradient.shape[1], x.shape[1])
        return torch.addmm(product, gradient.t(), x, beta=0, alpha=scale, out=product)
    x = x if scale == 1.0 else x * scale
    wide, narrow = gradient.shape[1], x.shape[1]
    # oneDNN copies its first factor: better the smaller one, and the result turned round
    turned = narrow < wide and narrow * wide <= MOST_TURNED
    total: Tensor | None = None
    for rows, of_rows in zip(gradient.split(MOST_TERMS), x.split(MOST_TERMS), strict=True):
        first, second = (of_rows, rows) if turned else (rows, of_rows)
        part = _onednn(first.t(), second.t(), None)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.t().contiguous() if turned else total


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not wants_gradient(x, weight, bias):
        return _product(x, weight, bias)
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # nothing is kept for a gradient that nobody asks for
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.shape = x.shape
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_rows = None if x is None else x.reshape(-1, x.shape[-1])
        dx = None if weight is None else input_gradient(rows, weight).view(ctx.shape)
        return (
            dx,
            None if of_rows is None else weight_gradient(rows, of_rows),
            rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b, in as many parts as long chains need."""
    if x.dtype != torch.float32 or x.shape[-1] <= MOST_TERMS:
        return _onednn(x, weight, bias)
    size = -(-x.shape[-1] // -(-x.shape[-1] // MOST_TERMS))
    first, *others = zip(x.split(size, -1), weight.split(size, -1), strict=True)
    total = _onednn(*first, bias)
    for part in others:
        total += _onednn(*part, None)
    return total


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", how: str = ""
) -> Tensor:
    # a matrix with gaps between its rows would go to code that knows no instructions
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    # nor does it look at the steps between a bias's elements
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], how)  # type: ignore


def _takes(x: Tensor, dtype: torch.dtype, has_bias: bool) -> bool:
    """Whether oneDNN is the faster library for this product, and may be called by itself."""
    # interpreted kernels stand for those on a GPU, where products are torch's own
    if launch.INTERPRETED:
        return False
    # compilers, tracers and torch.func know products by torch's own names
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # type: ignore
        return False
    if x.device.type != "cpu" or x.dim() < 2:
        return False
    # torch.backends.mkldnn.flags(enabled=False) switches it off, here as everywhere
    if not torch._C._get_mkldnn_enabled():  # type: ignore[attr-defined]
        return False
    if dtype == torch.float32:
        return has_slow_fp32()
    return has_bias and dtype == torch.bfloat16 and has_bf16_products()


def _takes_gradient(gradient: Tensor) -> bool:
    return _takes(gradient, gradient.dtype, False) and gradient.numel() > 0


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may take these; of the rest torch says what is wrong, or computes it."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    cast = torch.is_autocast_enabled(x.device.type)
    return (
        all(type(t) in _PLAIN and t.device == x.device for t in tensors)
        and all(t.layout == torch.strided and not t.is_nested for t in tensors)
        and all(t.dtype in _CAST if cast else t.dtype == x.dtype for t in tensors)
        and x.numel() > 0
        and weight.numel() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


@functools.cache
def has_slow_fp32() -> bool:
    """Whether torch's own library for fp32 leaves out this processor's widest instructions."""
    if not (torch.backends.mkl.is_available() and _has_onednn()):
        return False
    known = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else ""
    return "AuthenticAMD" in known and "avx512f" in known


@functools.cache
def has_bf16_products() -> bool:
    """Whether oneDNN multiplies in bf16 here, on a processor where that was measured."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
