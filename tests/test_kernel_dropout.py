"""Triton's random numbers are those of philox.py, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_harness import DEVICE, runs_kernels

from fastbert.kernels import launch, ops
from fastbert.kernels.philox import Rng, exact_mask, keep_scale, keep_threshold, philox

triton = pytest.importorskip("triton", reason="triton comes with the test extra")
tl = pytest.importorskip("triton.language")

pytestmark = runs_kernels

if launch.INTERPRETED or DEVICE == "cuda":
    launch.require_triton(DEVICE)
    from fastbert.kernels.dropout import keep_factors, row_coordinates, subkey

    @triton.jit(do_not_specialize=["rows", "layer", "site"])
    def mask_kernel(
        out_ptr, state_ptr, sequence_ids_ptr, positions_ptr,
        rows, layer, site,
        COLUMNS: tl.constexpr, CHUNK: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * 4 + tl.arange(0, 4)
        first = tl.program_id(1) * CHUNK
        column = first + tl.arange(0, CHUNK)
        key = subkey(state_ptr, layer, site)
        sequence, position = row_coordinates(
            state_ptr, sequence_ids_ptr, positions_ptr, row, row < rows
        )
        factors = keep_factors(key, sequence, position, first, CHUNK, THRESHOLD, SCALE)
        mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
        tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], factors, mask=mask)

    @triton.jit
    def words_kernel(out_ptr, key, c0, c1, c2, c3, ROUNDS: tl.constexpr):
        zero = tl.zeros([1], tl.uint32)
        words = tl.philox(
            key, zero + c0.to(tl.uint32), zero + c1.to(tl.uint32), zero + c2.to(tl.uint32),
            zero + c3.to(tl.uint32), ROUNDS,
        )  # fmt: skip
        for i in tl.static_range(4):
            tl.store(out_ptr + i + tl.arange(0, 1), words[i].to(tl.int64))


def mask_of(shape, dropout_p, rng, chunk):
    out = torch.full(shape, torch.nan, device=DEVICE)
    mask_kernel[(triton.cdiv(shape[0], 4), triton.cdiv(shape[1], chunk))](
        out, rng.device_state(out.device), rng.sequence_ids, rng.positions,
        shape[0], rng.layer, rng.site,
        COLUMNS=shape[1], CHUNK=chunk,
        THRESHOLD=keep_threshold(dropout_p), SCALE=keep_scale(dropout_p),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("rounds", [7, 10])
def test_words_are_those_of_the_twin(rounds):
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    whole = key[0] | key[1] << 32
    words_kernel[(1,)](out, whole, *counter, ROUNDS=rounds)
    expected = philox(tuple(torch.tensor(word) for word in counter), key, rounds)
    assert [word & 0xFFFFFFFF for word in out.tolist()] == [int(word) for word in expected]


@pytest.mark.parametrize("seed", [0, 2**63 + 12345, -1, 2**32])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_masks_are_those_of_the_twin(seed, dropout_p):
    rng = Rng(seed, step=3, micro_batch=2, layer=1 << 20, site=5)
    assert torch.equal(
        mask_of((7, 100), dropout_p, rng, 64).cpu(), exact_mask((7, 100), dropout_p, rng)
    )


@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_masks_do_not_depend_on_the_tile(chunk):
    rng = Rng(3).rows(
        torch.tensor([9, 9, 2**31 - 1, 0, 0, 1], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 1, 511, 0, 1, 2], dtype=torch.int32, device=DEVICE),
    )
    assert torch.equal(mask_of((6, 72), 0.3, rng, chunk).cpu(), exact_mask((6, 72), 0.3, rng))


def test_the_state_on_the_device_decides():
    rng = Rng(seed=1).on(DEVICE)
    before = mask_of((8, 64), 0.5, rng, 64)
    rng.state.copy_(torch.tensor([1, 1, 0]))
    after = mask_of((8, 64), 0.5, rng, 64)
    assert not torch.equal(before, after)
    assert torch.equal(after.cpu(), exact_mask((8, 64), 0.5, Rng(seed=1, step=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 1), (7, 100), (3, 513), (0, 8)])
def test_dropout_alone_is_one_launch_each_way_under_the_twins_mask(shape, dtype):
    x = torch.randn(shape[0], 2, shape[1]).to(dtype).to(DEVICE)
    view = x[:, 1].detach().requires_grad_()
    rng = Rng(seed=3, step=1).rows(
        torch.arange(2 * shape[0], dtype=torch.int32, device=DEVICE)[::2], None
    )
    dy = torch.randn(shape).to(dtype).to(DEVICE)
    with launch.recording() as calls:
        ops.dropout(view, 0.3, rng).backward(dy)
    assert len(calls) == (2 if shape[0] else 0)
    view.grad = None
    with ops.use_backend("triton"):
        y = ops.dropout(view, 0.3, rng)
        y.backward(dy)
    mask = exact_mask(shape, 0.3, rng)
    assert torch.equal(y.detach().cpu(), (view.detach().cpu() * mask).to(dtype))
    assert torch.equal(view.grad.cpu(), (dy.cpu() * mask).to(dtype))
