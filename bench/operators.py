"""The operators that `fastbert bench kernels` times: inputs, bytes, operations, and rivals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import ops
from fastbert.kernels.ops import Layout, Rng

# of the embedding
VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
DROPOUT = 0.1
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """One line of the table.

    Attributes:
        name, shape: as printed; `rows` comes first in the shape.
        kernels: names in the compile matrix, for the static picture.
        ours: takes the inputs by name.
        plain: the same as plain PyTorch writes it.
        make: fp32 inputs for a number of rows.
        backward: whether gradients are taken too.
        moved_bytes, operations: the least that must be moved and computed, at the shape's rows.
        liger: the same in Liger-Kernel; None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    kernels: tuple[str, ...]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    make: Callable[[int], Inputs]
    backward: bool
    moved_bytes: float
    operations: float
    liger: Callable[..., Tensor] | None = None


def operators(rows: int, itemsize: int, widths: tuple[int, ...]) -> Iterator[Operator]:
    """LayerNorm, the feed-forward block and the embedding at these hidden sizes."""
    for width in widths:
        for backward in (False, True):
            yield from _norms(rows, itemsize, width, backward)
    for width in widths:
        for backward in (False, True):
            yield _feed_forward(rows, itemsize, width, backward)
    for width in widths:
        for backward in (False, True):
            yield _embedding(rows, itemsize, width, backward)


def _norms(rows: int, itemsize: int, width: int, backward: bool) -> Iterator[Operator]:
    # forward x, residual, y; backward dy, x, residual, dx, which is dresidual too
    tensors = 3 + 4 * backward
    kernels = ("layer_norm_fwd", "layer_norm_bwd")[: 1 + backward]
    common: dict[str, Any] = {
        "shape": (rows, width),
        "kernels": kernels,
        "make": _norm_inputs(width),
        "backward": backward,
        # of additions and multiplications, some ten an element and pass, which nobody waits for
        "operations": 0.0,
    }
    yield Operator(
        "layer_norm" + _direction(backward),
        ours=ops.layer_norm,
        plain=plain_norm,
        moved_bytes=tensors * rows * width * itemsize,
        liger=_liger_norm,
        **common,
    )
    yield Operator(
        "layer_norm, dropout" + _direction(backward),
        ours=_dropped_norm,
        plain=functools.partial(plain_norm, dropout_p=DROPOUT),
        moved_bytes=(tensors + backward) * rows * width * itemsize,
        **common,
    )


def _feed_forward(rows: int, itemsize: int, hidden_size: int, backward: bool) -> Operator:
    intermediate_size = 4 * hidden_size
    products = 2 * rows * hidden_size * intermediate_size
    return Operator(
        "feed_forward" + _direction(backward),
        (rows, hidden_size, intermediate_size),
        ("bias_activation_fwd", "bias_activation_bwd")[: 1 + backward],
        ops.feed_forward,
        plain_feed_forward,
        _feed_forward_inputs(hidden_size, intermediate_size),
        backward,
        (2 + 3 * backward) * rows * hidden_size * itemsize,
        (2 + 4 * backward) * products,
    )


def _embedding(rows: int, itemsize: int, width: int, backward: bool) -> Operator:
    # forward reads a row of words a token and writes one, positions and segments stay in the
    # cache; backward reads dy and the rows again, writes the sum's gradient in fp32, and reads it
    # three times, once a table, each of which is written once
    rows_bytes = rows * width * itemsize
    tables = (VOCABULARY + POSITIONS + SEGMENTS) * width * 4
    return Operator(
        "embedding, dropout" + _direction(backward),
        (rows, width),
        ("embedding_fwd", "embedding_bwd")[: 1 + backward],
        _embedded,
        functools.partial(plain_embedding, dropout_p=DROPOUT),
        _embedding_inputs(width),
        backward,
        2 * rows_bytes + backward * (2 * rows_bytes + 4 * rows * width * 4 + tables),
        0.0,
    )


def _norm_inputs(width: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        "x": torch.randn(rows, width),
        "weight": 1 + torch.randn(width) / 8,
        "bias": torch.randn(width),
        "x_bias": torch.randn(width),
        "residual": torch.randn(rows, width),
    }


def _feed_forward_inputs(hidden_size: int, intermediate_size: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        "x": torch.randn(rows, hidden_size),
        "w1": torch.randn(intermediate_size, hidden_size) * hidden_size**-0.5,
        "b1": torch.randn(intermediate_size),
        "w2": torch.randn(hidden_size, intermediate_size) * intermediate_size**-0.5,
    }


def _embedding_inputs(width: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        # frequent words are very frequent: a cube crowds near zero
        "input_ids": (torch.rand(rows).pow(3) * VOCABULARY).long(),
        "position_ids": torch.arange(rows) % POSITIONS,
        "token_type_ids": torch.arange(rows) % POSITIONS * SEGMENTS // POSITIONS,
        "word_weight": torch.randn(VOCABULARY, width),
        "position_weight": torch.randn(POSITIONS, width),
        "token_type_weight": torch.randn(SEGMENTS, width),
        "norm_weight": 1 + torch.randn(width) / 8,
        "norm_bias": torch.randn(width),
    }


@functools.cache
def _rng(device: torch.device, exact: bool) -> Rng:
    # its state is copied to the device once, as in training, not once a call
    return Rng(seed=1, exact=exact).on(device)


def _draw(x: Tensor) -> Rng:
    # without a GPU training draws from torch's generators
    return _rng(x.device, torch.cuda.is_available())


def _dropped_norm(**tensors: Any) -> Tensor:
    return ops.layer_norm(**tensors, dropout_p=DROPOUT, rng=_draw(tensors["x"]))


def _embedded(**tensors: Any) -> Tensor:
    return ops.embedding(**tensors, dropout_p=DROPOUT, rng=_draw(tensors["input_ids"]))


def plain_norm(
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
    """ops.layer_norm as plain PyTorch writes it: a pass for each part."""
    total = x if x_bias is None else x + x_bias
    total = F.dropout(total, dropout_p) if dropout_p else total
    total = total if residual is None else total + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps)


def plain_feed_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """ops.feed_forward likewise."""
    approximate = "tanh" if activation == "gelu_new" else "none"
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


def plain_embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    layout: Layout | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    sparse: bool = False,
) -> Tensor:
    """ops.embedding likewise; a tail is embedded like text."""
    total = F.embedding(input_ids, word_weight, sparse=sparse)
    total = total + F.embedding(position_ids, position_weight)
    total = total + F.embedding(token_type_ids, token_type_weight)
    normed = F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
    return F.dropout(normed, dropout_p) if dropout_p else normed


def _liger_norm(**tensors: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore

    # Liger's norm adds nothing: the sum is a pass of its own
    total = tensors["x"] + tensors["x_bias"] + tensors["residual"]
    parameters = tensors["weight"], tensors["bias"]
    normed: Tensor = LigerLayerNormFunction.apply(total, *parameters, 1e-12)
    return normed


def _direction(backward: bool) -> str:
    return ", forward + backward" if backward else ", forward"
