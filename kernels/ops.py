"""The public operators: checks, autocast and dispatch. Models reach operators through this file.

Every operator takes fp32, bf16, fp16 or fp64 tensors on any device. Under autocast, matrix inputs
are cast to the autocast dtype and outputs have that dtype; parameters of norms stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.kernels import launch, reference
from fastbert.kernels.attention_ops import (
    Attended,
    attention,
    fused_qkv_attention,
    rotary,
    with_attention_words,
)
from fastbert.kernels.checks import (
    KERNEL_DTYPES,
    check_activation,
    check_dropout,
    check_kernel_inputs,
    check_kernel_width,
    check_shapes,
    check_width,
    compute_dtype,
    draw,
    no_autocast,
    wants_gradient,
)
from fastbert.kernels.embedding_ops import embedding
from fastbert.kernels.launch import describe, use_backend, uses_triton
from fastbert.kernels.layout import Layout
from fastbert.kernels.masked_lm_ops import CrossEntropy, linear_cross_entropy, masked_lm_loss
from fastbert.kernels.philox import Rng, uniforms
from fastbert.kernels.products import linear
from fastbert.kernels.selected_qkv import selected_qkv
from fastbert.kernels.transfer import overwrite, sent

__all__ = [
    "Attended",
    "CrossEntropy",
    "Layout",
    "NormedSum",
    "Rng",
    "attention",
    "describe",
    "dropout",
    "embedding",
    "feed_forward",
    "fused_qkv_attention",
    "gated_feed_forward",
    "layer_norm",
    "layer_norm_with_sum",
    "linear",
    "linear_cross_entropy",
    "masked_lm_loss",
    "overwrite",
    "rotary",
    "selected_qkv",
    "sent",
    "uniforms",
    "use_backend",
    "uses_triton",
    "wants_gradient",
    "with_attention_words",
]


class NormedSum(NamedTuple):
    """What layer_norm_with_sum returns.

    Attributes:
        output: [rows, hidden_size], the norm.
        total: [rows, hidden_size], residual + dropout(x + x_bias).
    """

    output: Tensor
    total: Tensor


def dropout(x: Tensor, dropout_p: float, rng: Rng | None) -> Tensor:
    """Dropout (Srivastava et al. 2014).

    Args:
        x: any shape.
        dropout_p: probability of a zero, in [0, 1).
        rng: names the draw; needed where dropout_p > 0.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: dropout_p out of range, or no rng for it.
    """
    check_dropout("dropout", dropout_p, rng)
    if dropout_p > 0.0 and x.dim() == 2 and x.dtype in KERNEL_DTYPES and launch.uses_triton(x):
        drawn = draw("dropout", x, dropout_p, rng)
        rows: Tensor = _kernels(x).dropped(x if x.stride(-1) == 1 else x.contiguous(), drawn)
        return rows
    return reference.dropout(x, dropout_p, rng)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + x_bias)) (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [rows, hidden_size].
        weight, bias: [hidden_size].
        x_bias: [hidden_size], the bias of the projection that made `x`.
        residual: [rows, hidden_size].
        eps: added to the variance.
        dropout_p: in [0, 1).
        rng: names the dropout draw.

    Returns:
        [rows, hidden_size] in the dtype of `x`, or the autocast dtype.

    Raises:
        ValueError: shapes that do not fit, dropout_p out of range.
    """
    y, _ = _layer_norm("layer_norm", x, weight, bias, x_bias, residual, eps, dropout_p, rng, False)
    return y


def layer_norm_with_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
) -> NormedSum:
    """layer_norm with the sum it normalises, which pre-LN layers carry on as their residual.

    Arguments and errors are those of `layer_norm`.
    """
    operator = "layer_norm_with_sum"
    return NormedSum(
        *_layer_norm(operator, x, weight, bias, x_bias, residual, eps, dropout_p, rng, True)
    )


def _layer_norm(
    operator: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dropout_p: float,
    rng: Rng | None,
    wants_total: bool,
) -> tuple[Tensor, Tensor]:
    check_dropout(operator, dropout_p, rng)
    hidden_size = weight.shape[0]
    check_width(operator, x, hidden_size)
    check_shapes(
        operator,
        ("bias", bias, weight.shape),
        ("x_bias", x_bias, weight.shape),
        ("residual", residual, x.shape),
    )
    dtype = compute_dtype(x)
    if launch.uses_triton(x):
        check_kernel_width(operator, hidden_size)
        check_kernel_inputs(
            operator, x=x, weight=weight, bias=bias, x_bias=x_bias, residual=residual
        )
        drawn = draw(operator, x, dropout_p, rng)
        return _kernels(x).normalise(
            x, weight, bias, x_bias, residual, drawn, eps, dtype, wants_total
        )
    parts: dict[str, Any] = {
        "x_bias": x_bias,
        "residual": None if residual is None else residual.to(dtype),
        "eps": eps,
        "dropout_p": dropout_p,
        "rng": rng,
    }
    with no_autocast(x):
        if wants_total:
            return reference.layer_norm_with_sum(x.to(dtype), weight, bias, **parts)
        y = reference.layer_norm(x.to(dtype), weight, bias, **parts)
        return y, y


def feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """GELU(x w1' + b1) w2' + b2 (Vaswani et al. 2017; Hendrycks and Gimpel 2016).

    Args:
        x: [rows, hidden_size].
        w1: [intermediate_size, hidden_size]; b1: [intermediate_size].
        w2: [hidden_size, intermediate_size]; b2: [hidden_size], or None where layer_norm adds it.
        activation: "gelu" (exact, erf) or "gelu_new" (tanh).

    Returns:
        [rows, hidden_size] in the dtype of `x`, or the autocast dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    check_activation("feed_forward", activation)
    intermediate_size, hidden_size = w1.shape
    check_width("feed_forward", x, hidden_size)
    check_shapes(
        "feed_forward",
        ("b1", b1, (intermediate_size,)),
        ("w2", w2, (hidden_size, intermediate_size)),
        ("b2", b2, (hidden_size,)),
    )
    dtype = compute_dtype(x)
    if launch.uses_triton(x):
        check_kernel_inputs("feed_forward", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
        with no_autocast(x):
            return _kernels(x).activated(
                x.to(dtype), w1.to(dtype), b1, w2.to(dtype), b2, activation, False
            )
    with no_autocast(x):
        return reference.feed_forward(
            x.to(dtype),
            w1.to(dtype),
            b1.to(dtype),
            w2.to(dtype),
            None if b2 is None else b2.to(dtype),
            activation=activation,
        )


def gated_feed_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """(GELU(a) * g) w2' + b2 with [a | g] = x w1' + b1: GeGLU (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [rows, hidden_size].
        w1: [2 * intermediate_size, hidden_size], the activated half first.
        w2: [hidden_size, intermediate_size].
        b1: [2 * intermediate_size]; b2: [hidden_size].
        activation: "gelu" (exact, erf) or "gelu_new" (tanh).

    Returns:
        [rows, hidden_size] in the dtype of `x`, or the autocast dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    check_activation("gated_feed_forward", activation)
    hidden_size, intermediate_size = w2.shape
    check_width("gated_feed_forward", x, hidden_size)
    check_shapes(
        "gated_feed_forward",
        ("w1", w1, (2 * intermediate_size, hidden_size)),
        ("b1", b1, (2 * intermediate_size,)),
        ("b2", b2, (hidden_size,)),
    )
    dtype = compute_dtype(x)
    if launch.uses_triton(x):
        check_kernel_inputs("gated_feed_forward", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
        with no_autocast(x):
            return _kernels(x).activated(
                x.to(dtype), w1.to(dtype), b1, w2.to(dtype), b2, activation, True
            )
    with no_autocast(x):
        return reference.gated_feed_forward(
            x.to(dtype),
            w1.to(dtype),
            w2.to(dtype),
            b1=None if b1 is None else b1.to(dtype),
            b2=None if b2 is None else b2.to(dtype),
            activation=activation,
        )


def _kernels(tensor: Tensor) -> Any:
    if not torch.compiler.is_compiling():
        launch.require_triton(tensor.device.type)
    # where Triton is missing, and on CPUs, none of this is ever imported
    from fastbert.kernels import autograd

    return autograd
