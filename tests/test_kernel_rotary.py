from __future__ import annotations

import pytest
import torch
from kernel_harness import DEVICE, DTYPES, by, normal, runs_kernels
from oracle import check_operator, poison

from fastbert.kernels import ops

pytestmark = runs_kernels


def tables(count: int, head_dim: int) -> dict[str, torch.Tensor]:
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half).double() / half)
    angles = torch.arange(count)[:, None] * frequency
    return {"cos": angles.cos().float().to(DEVICE), "sin": angles.sin().float().to(DEVICE)}


def check(tokens, heads, head_dim, dtype):
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 7
    constants = {**tables(7, head_dim), "positions": positions}
    with poison():
        check_operator(
            by("triton", ops.rotary, **constants),
            by("reference", ops.rotary, **constants),
            lambda generator: {"qkv": normal(generator, tokens, 3, heads, head_dim)},
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_every_head_size(head_dim, dtype):
    check(5, 2, head_dim, dtype)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_tokens(tokens):
    check(tokens, 3, 32, torch.float32)


def test_values_pass_bit_for_bit_and_turning_back_restores():
    qkv = torch.randn(9, 3, 2, 64, device=DEVICE)
    positions = torch.arange(9, device=DEVICE)
    made = tables(9, 64)
    with ops.use_backend("triton"):
        turned = ops.rotary(qkv, positions=positions, **made)
        back = ops.rotary(turned, made["cos"], -made["sin"], positions)
    assert torch.equal(turned[:, 2], qkv[:, 2])
    # position 0 has no angle
    assert torch.equal(turned[0], qkv[0])
    assert not torch.equal(turned[1, :2], qkv[1, :2])
    error, size = (back - qkv).abs().max(), qkv.abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * size


def test_strided_rows():
    wide = torch.randn(6, 4, 2, 32, device=DEVICE)
    positions = torch.arange(6, device=DEVICE)
    with ops.use_backend("triton"):
        strided = ops.rotary(wide[:, 1:], positions=positions, **tables(6, 32))
        whole = ops.rotary(wide[:, 1:].contiguous(), positions=positions, **tables(6, 32))
    assert torch.equal(strided, whole)


def test_a_position_behind_the_tables_reads_nothing():
    qkv = torch.randn(2, 3, 1, 32, device=DEVICE)
    with ops.use_backend("triton"):
        turned = ops.rotary(qkv, positions=torch.tensor([3, -1], device=DEVICE), **tables(3, 32))
    assert torch.equal(turned, qkv)
