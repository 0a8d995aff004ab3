from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.kernels import attention_blocks as module
from fastbert.kernels.layout import Layout

LENGTHS = st.lists(st.integers(0, 70), max_size=8)
few = settings(deadline=None, derandomize=True, max_examples=25)


def layout_of(lengths: list[int], tail: int = 0) -> Layout:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Layout(bounds, sum(lengths) + tail, max(lengths, default=0))


@few
@given(LENGTHS, st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_rows_come_back_to_where_they_were(lengths, tail, dtype, small):
    """In one chunk and in many, from a tensor and from a part of a wider one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 1 << 10 if small else 1 << 20)
        layout = layout_of(lengths, tail)
        fused = torch.randn(layout.capacity, 3, 2, 8, dtype=dtype)
        results = torch.full_like(fused, math.nan)
        for blocks in layout.chunks(dtype, 2, 8):
            flat, room = blocks.room(fused, 3)
            for part, written in zip(fused.unbind(1), room, strict=True):
                for taken, place, group in zip(
                    blocks.take(part), written, blocks.groups, strict=True
                ):
                    assert taken.shape == (group.sequences, 2, group.length, 8)
                    assert torch.equal(taken, blocks_of(part, group))
                    place.copy_(taken)
            blocks.give(results, room, flat)
    real = layout.num_tokens()
    assert torch.equal(results[:real], fused[:real])
    # one chunk of all groups fills the tail, others leave it
    chunks = layout.chunks(dtype, 2, 8)
    filled = len(chunks) == 1 and chunks[0].groups[0].start is None
    assert (results[real:] == 0.0 if filled else results[real:].isnan()).all()


def blocks_of(tensor: torch.Tensor, group: module.Group) -> torch.Tensor:
    rows = tensor[group.index].unflatten(0, (group.sequences, group.length))
    return rows.transpose(1, 2)


@few
@given(LENGTHS)
def test_chunks_hold_every_group_once_and_no_more_than_they_may(lengths):
    layout = layout_of(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 1 << 12)
        for dtype in (torch.float32, torch.bfloat16):
            chunks = layout.chunks(dtype, 2, 8)
            groups = [group for blocks in chunks for group in blocks.groups]
            assert [id(group) for group in groups] == [id(g) for g in layout.groups(dtype)]
            for blocks in chunks:
                assert blocks.whole == (len(chunks) == 1)
                assert blocks.slots == sum(2 * len(group.index) for group in blocks.groups)
                fits = blocks.slots * 8 * dtype.itemsize <= 1 << 12
                assert fits or len(blocks.groups) == 1


def test_a_run_of_rows_is_read_where_it_lies_in_fp32():
    tensor = torch.randn(40, 2, 8)
    (blocks,) = layout_of([40]).chunks(torch.float32, 2, 8)
    assert blocks.take(tensor)[0].data_ptr() == tensor.data_ptr()
    # 16-bit products would copy it themselves
    tensor = torch.randn(48, 2, 8).bfloat16()
    (blocks,) = layout_of([48]).chunks(torch.bfloat16, 2, 8)
    assert blocks.take(tensor)[0].is_contiguous()


def test_what_is_of_no_sequence_is_filled():
    layout = layout_of([5, 9], tail=3)
    (blocks,) = layout.chunks(torch.bfloat16, 1, 1)
    target = torch.zeros(17, 1, 1, 1, dtype=torch.bfloat16)
    ones = [torch.ones(g.sequences, 1, g.length, 1, dtype=torch.bfloat16) for g in blocks.groups]
    blocks.give(target, [ones], fill=-math.inf)
    assert target.flatten().tolist() == [1.0] * 14 + [-math.inf] * 3


def test_a_copied_layout_forgets_its_chunks():
    ours, theirs = layout_of([5, 9]), layout_of([9, 5])
    ours.chunks(torch.bfloat16, 2, 8)
    ours.copy_(theirs)
    tensor = torch.randn(14, 2, 8).bfloat16()
    for mine, other in zip(
        ours.chunks(torch.bfloat16, 2, 8), theirs.chunks(torch.bfloat16, 2, 8), strict=True
    ):
        for a, b in zip(mine.take(tensor), other.take(tensor), strict=True):
            assert torch.equal(a, b)
