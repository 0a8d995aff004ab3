"""Projections by their weights where they are nothing else, by their own call where somebody's
adapter or hook sits on them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.kernels import ops


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(module: nn.Module) -> bool:
    """Whether a projection is its weight and its bias; a quantised or sharded weight is more."""
    if type(module) is not nn.Linear or is_hooked(module):
        return False
    return type(module.weight) in (nn.Parameter, Tensor)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """The whole projection."""
    if is_plain(module):
        return ops.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return module(x)  # type: ignore[no-any-return]


def project_qkv(module: nn.Module, x: Tensor, rows: Tensor | None) -> Tensor:
    """Query, key and value in one; where rows are given, nobody reads the queries of others."""
    if rows is None or not is_plain(module):
        return project(module, x)
    return ops.selected_qkv(x, module.weight, module.bias, rows)  # type: ignore[arg-type]


def product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product, and the bias that is still to be added: layer_norm does it on the way, but for
    inference without kernels, where the product does."""
    if not is_plain(module):
        return module(x), None
    of_product, of_norm = _bias(module, x)
    return ops.linear(x, module.weight, of_product), of_norm  # type: ignore[arg-type]


def feed_forward(
    inner: nn.Module, outer: nn.Module, x: Tensor, activation: str
) -> tuple[Tensor, Tensor | None]:
    """outer(GELU(inner(x))), and the bias that is still to be added."""
    if is_plain(inner) and is_plain(outer) and inner.bias is not None:
        w1, b1, w2 = inner.weight, inner.bias, outer.weight
        of_product, of_norm = _bias(outer, x)
        return ops.feed_forward(x, w1, b1, w2, of_product, activation=activation), of_norm  # type: ignore
    return product(outer, _gelu(inner(x), activation))


def gated_feed_forward(
    inner: nn.Module, outer: nn.Module, x: Tensor, activation: str
) -> tuple[Tensor, Tensor | None]:
    """outer(GELU(a) * g) with [a | g] = inner(x), and the bias that is still to be added."""
    if is_plain(inner) and is_plain(outer):
        w1, b1, w2 = inner.weight, inner.bias, outer.weight
        of_product, of_norm = _bias(outer, x)
        gated = ops.gated_feed_forward(x, w1, w2, b1=b1, b2=of_product, activation=activation)  # type: ignore
        return gated, of_norm
    activated, gate = inner(x).chunk(2, dim=-1)
    return product(outer, _gelu(activated, activation) * gate)


def _bias(module: nn.Module, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A projection's bias as its product adds it, or as layer_norm does.

    layer_norm adds it before anything is rounded to 16 bits: where a row's terms nearly cancel,
    gradients would feel a rounding.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    if ops.uses_triton(x) or ops.wants_gradient(x, weight, bias):
        return None, bias
    return bias, None


def _gelu(x: Tensor, activation: str) -> Tensor:
    return F.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")
