"""The public operators of attention: checks, autocast and dispatch; ops.py hands them on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastbert.kernels import launch, reference_attention
from fastbert.kernels.attention_launch import HEAD_DIMS
from fastbert.kernels.checks import (
    check_dropout,
    check_kernel_inputs,
    compute_dtype,
    no_autocast,
)
from fastbert.kernels.layout import Layout
from fastbert.kernels.philox import Rng, check_rows
from fastbert.kernels.reference_attention import Plan

# kernels number the elements of a tile of up to 128 rows in 32 bits
MAX_ROW_STRIDE = 1 << 24


class Attended(NamedTuple):
    """What attention returns with return_lse.

    Attributes:
        output: [tokens, heads, head_dim].
        lse: [heads, tokens] fp32 (fp64 for fp64 inputs), the log-sum-exp of the scaled and biased
            scores; -inf in rows past the last sequence. Differentiable.
    """

    output: Tensor
    lse: Tensor


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    layout: Layout | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    layout: Layout | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: Literal[True],
) -> Attended: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    layout: Layout | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | Attended:
    """Bidirectional attention within each sequence of a packed stream (Vaswani et al. 2017).

    Args:
        query, key, value: [tokens, heads, head_dim], strided views allowed.
        cu_seqlens: [sequences + 1] int32, first 0, last the number of real tokens.
        layout: of this batch, shared by all layers; worked out here where None.
        softmax_scale: head_dim ** -0.5 where None.
        dropout_p: on the probabilities, in [0, 1).
        rng: names the dropout draw; its rows are the tokens.
        window: (left, right): a query sees keys that many places before and after it at most
            (Beltagy et al. 2020, arXiv:2004.05150); None for all of its sequence.
        alibi_slopes: [heads]; scores lose slope * |query's place - key's place| (Press et al. 2021,
            arXiv:2108.12409). Not differentiated.
        return_lse: return `Attended`, with the log-sum-exp.

    Returns:
        [tokens, heads, head_dim]; rows past the last sequence are zero and get zero gradient.
        A NaN or Inf inside a sequence stays in that sequence on the reference path; the kernels
        may hand it to sequences in the same tile, and to none further away.

    Raises:
        ValueError: shapes that do not fit, dropout_p or window out of range, wrong cu_seqlens
            (where they lie on the host; Layout.check() asks a device). The kernels take head_dim
            32, 64, 96 and 128.
    """
    if query.dim() != 3 or not query.shape == key.shape == value.shape:
        raise ValueError(
            "attention: query, key and value must all be [tokens, heads, head_dim], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    plan = _plan(
        "attention",
        query,
        layout or _layout(cu_seqlens, query),
        softmax_scale,
        dropout_p,
        rng,
        window,
        alibi_slopes,
        return_lse,
    )
    output, lse = _attended("attention", {"query": query, "key": key, "value": value}, plan)
    return Attended(output, lse) if return_lse else output


def fused_qkv_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    layout: Layout | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """attention of one fused projection, whose gradient is one tensor too: nothing is copied.

    Args:
        qkv: [tokens, 3, heads, head_dim]: query, key and value of each token.

    The other arguments, the result and the errors are those of `attention`.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"fused_qkv_attention: qkv must be [tokens, 3, heads, head_dim], got {list(qkv.shape)}"
        )
    plan = _plan(
        "fused_qkv_attention",
        qkv[:, 0],
        layout or _layout(cu_seqlens, qkv),
        softmax_scale,
        dropout_p,
        rng,
        window,
        alibi_slopes,
        False,
    )
    output, _ = _attended("fused_qkv_attention", {"qkv": qkv}, plan)
    return output


def with_attention_words(rng: Rng, tokens: int, heads: int, device: torch.device) -> Rng:
    """The rng with the words that attention's masks need, one draw for all layers of a step.

    Where attention runs as PyTorch nothing is drawn ahead, and the rng comes back as it is.

    Args:
        rng: with the rows' coordinates.
        tokens, heads: of the attention to come.
        device: where it runs.
    """
    if not launch.uses_triton(torch.empty(0, device=device)):
        return rng
    check_rows("with_attention_words", rng, tokens)
    state = rng.device_state(device)
    words = _kernels(state).attention_words(state, *rng.coordinates(), tokens, heads)
    return replace(rng, words=words)


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) for queries and keys.

    Element i of a head's first half and element i of its second half are turned by the angle i of
    the token's position.

    Args:
        qkv: [tokens, 3, heads, head_dim], a fused projection; head_dim is even.
        cos, sin: [positions, head_dim // 2] fp32, of every position's angles.
        positions: [tokens] integers, each a row of the tables; Layout.rows() has them.

    Returns:
        [tokens, 3, heads, head_dim]: query and key turned, value as it was.

    Raises:
        ValueError: shapes that do not fit.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[3] % 2:
        raise ValueError(
            f"rotary: qkv must be [tokens, 3, heads, an even head_dim], got {list(qkv.shape)}"
        )
    wanted = (*cos.shape[:1], qkv.shape[3] // 2)
    if cos.shape != wanted or sin.shape != wanted:
        raise ValueError(
            f"rotary: cos and sin must both be [positions, {qkv.shape[3] // 2}], got "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    if positions.shape != qkv.shape[:1]:
        raise ValueError(
            f"rotary: positions must be [{qkv.shape[0]}], one a token, got {list(positions.shape)}"
        )
    dtype = compute_dtype(qkv)
    with no_autocast(qkv):
        if not launch.uses_triton(qkv):
            return reference_attention.rotary(qkv.to(dtype), cos, sin, positions)
        check_kernel_inputs("rotary", qkv=qkv)
        tables = (table.detach().to(qkv.device, torch.float32).contiguous() for table in (cos, sin))
        turned: Tensor = _kernels(qkv).turned(qkv.to(dtype), *tables, positions.contiguous())
        return turned


def _attended(operator: str, tensors: dict[str, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """On the path that the tensors' device takes: query, key and value, or one projection."""
    first = next(iter(tensors.values()))
    dtype = compute_dtype(first)
    with no_autocast(first):
        if not launch.uses_triton(first):
            return reference_attention.attend(plan, *(t.to(dtype) for t in tensors.values()))
        _check_kernel_inputs(operator, tensors)
        if plan.rng is not None:
            check_rows(operator, plan.rng, first.shape[0])
        cast = tuple(tensor.to(dtype) for tensor in tensors.values())
        return _kernels(first).attended(cast, plan)  # type: ignore[no-any-return]


def _check_kernel_inputs(operator: str, tensors: dict[str, Tensor]) -> None:
    check_kernel_inputs(operator, **tensors)
    for name, tensor in tensors.items():
        if tensor.shape[-1] not in HEAD_DIMS:
            raise ValueError(
                f"{operator}: head_dim must be one of {', '.join(map(str, HEAD_DIMS))} for Triton, "
                f"got {tensor.shape[-1]}; use_backend('reference') takes any"
            )
        if tensor.stride(0) >= MAX_ROW_STRIDE:
            raise ValueError(
                f"{operator}: rows of {name} must lie less than {MAX_ROW_STRIDE} elements apart, "
                f"got {tensor.stride(0)}; call .contiguous()"
            )


def _kernels(tensor: Tensor) -> Any:
    if not torch.compiler.is_compiling():
        launch.require_triton(tensor.device.type)
    # where Triton is missing, and on CPUs, none of this is ever imported
    from fastbert.kernels import autograd_attention

    return autograd_attention


def _layout(cu_seqlens: Tensor, tensor: Tensor) -> Layout:
    tokens = tensor.shape[0]
    return Layout(cu_seqlens, capacity=tokens, max_seqlen=tokens)


def _plan(
    operator: str,
    query: Tensor,
    layout: Layout,
    softmax_scale: float | None,
    dropout_p: float,
    rng: Rng | None,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    wants_lse: bool,
) -> Plan:
    check_dropout(operator, dropout_p, rng)
    tokens, heads, head_dim = query.shape
    if not heads or not head_dim:
        raise ValueError(
            f"{operator}: heads and head_dim must be at least 1, got {heads} and {head_dim}"
        )
    if layout.capacity != tokens:
        raise ValueError(f"{operator}: layout is for {layout.capacity} tokens, got {tokens}")
    if window is not None and (len(window) != 2 or min(window) < 0):
        raise ValueError(f"{operator}: window must be (left, right), none negative, got {window}")
    if alibi_slopes is not None:
        if alibi_slopes.shape != (heads,):
            raise ValueError(
                f"{operator}: alibi_slopes must be [{heads}], one a head, got "
                f"{list(alibi_slopes.shape)}"
            )
        if torch.is_grad_enabled() and alibi_slopes.requires_grad:
            raise ValueError(f"{operator}: alibi_slopes have no gradient: detach them")
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    return Plan(layout, scale, dropout_p, rng, window, alibi_slopes, wants_lse)
