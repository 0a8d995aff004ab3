from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.kernels.layout import Layout

LENGTHS = st.lists(
    st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]), st.integers(0, 200)),
    max_size=12,
)


def layout_of(lengths: list[int], tail: int = 0) -> Layout:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    capacity = int(cu_seqlens[-1]) + tail
    return Layout(cu_seqlens, capacity=capacity, max_seqlen=max(lengths, default=0))


def test_the_plan_is_made_once():
    layout = layout_of([5, 9])
    groups = layout.groups(torch.float32)
    assert layout.groups(torch.float64) is groups
    # 16 bits have a plan of their own, which does not take the other's place
    assert layout.groups(torch.bfloat16) is layout.groups(torch.float16) is not groups
    assert layout.groups(torch.float32) is groups


SHORT = st.lists(st.one_of(st.sampled_from([0, 1, 63, 64]), st.integers(0, 64)), max_size=20)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(LENGTHS, st.integers(0, 5))
@example([], 0)
@example([], 3)
@example([0, 0, 5, 0, 0], 2)
def test_rows_know_their_sequence(lengths, tail):
    layout = layout_of(lengths, tail)
    ids = torch.arange(len(lengths)) * 3 + 7
    rows = Layout(layout.cu_seqlens, layout.capacity, layout.max_seqlen, ids).rows()
    expected = []
    start = 0
    for number, length in enumerate(lengths):
        expected += [[start, start + length, place, 3 * number + 7] for place in range(length)]
        start += length
    expected += [[0, 0, 0, 0]] * tail
    assert torch.stack(rows).t().tolist() == expected
    assert all(column.dtype == torch.int32 for column in rows)
    assert layout.rows().sample_ids is None


@settings(deadline=None, derandomize=True, max_examples=50)
@given(SHORT, st.integers(0, 200), st.integers(0, 3))
@example([], 0, 0)
@example([64] * 9, 0, 0)
@example([1, 64] * 6, 0, 2)
@example([33] * 12, 130, 0)
def test_tiles_own_whole_sequences_and_cover_every_row(lengths, tail, spare):
    bounds = layout_of(lengths).cu_seqlens
    bounds = torch.cat([bounds, bounds[-1:].expand(spare)])
    capacity = int(bounds[-1]) + tail
    layout = Layout(bounds, capacity, max(lengths, default=0))
    tiles = layout.tiles()
    assert layout.block == 64 and tiles.dtype == torch.int32
    # the shape follows from the capacity alone
    assert tiles.shape == (2 * -(-capacity // 64) + 2,)
    edges = tiles.tolist()
    assert edges[0] == 0 and edges[-1] == capacity
    assert all(0 <= end - start <= 64 for start, end in itertools.pairwise(edges))
    # no sequence is cut: every edge among the real rows is a boundary
    assert {edge for edge in edges if edge <= int(bounds[-1])} <= set(bounds.tolist())
    assert int(bounds[-1]) in edges


@pytest.mark.parametrize("max_seqlen, block", [(0, 64), (64, 64), (65, 128), (128, 128)])
def test_the_bound_picks_the_tile(max_seqlen, block):
    layout = Layout(torch.tensor([0, 10], dtype=torch.int32), 20, max(max_seqlen, 10))
    layout.max_seqlen = max_seqlen
    assert layout.block == block


def test_long_sequences_have_no_tiles_of_their_own():
    layout = layout_of([129, 3])
    assert layout.block is None and layout.tiles() is None


def test_a_layout_travels_with_its_rows_and_tiles():
    layout = Layout(torch.tensor([0, 20, 23], dtype=torch.int32), 30, 20, torch.tensor([4, 9]))
    moved = layout.to("cpu")
    assert moved._rows is not None and moved._tiles is not None
    assert torch.equal(torch.stack(moved.rows()), torch.stack(layout.rows()))
    assert torch.equal(moved.tiles(), layout.tiles())


def test_another_batch_is_written_into_the_same_memory():
    def layout(bounds, ids):
        return Layout(torch.tensor(bounds, dtype=torch.int32), 30, 20, torch.tensor(ids))

    ours, other = layout([0, 20, 23], [4, 9]), layout([0, 7, 7], [5, 1])
    rows, tiles = ours.rows(), ours.tiles()
    groups = ours.groups(torch.float32)
    ours.copy_(other)
    assert ours.rows().starts.data_ptr() == rows.starts.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(rows, other.rows(), strict=True))
    assert torch.equal(tiles, other.tiles())
    assert ours.num_tokens() == 7 and ours.groups(torch.float32) is not groups
    with pytest.raises(ValueError, match="layout: a layout to copy must have the same capacity"):
        ours.copy_(layout([0, 7, 7, 7], [5, 1, 1]))


BAD_BOUNDS = [
    ([1, 5], r"must ascend from 0 to at most 9 tokens, got \[1, 5\]"),
    ([0, 5, 4], r"must ascend from 0 to at most 9 tokens, got \[0, 5, 4\]"),
    ([0, 10], r"must ascend from 0 to at most 9 tokens, got \[0, 10\]"),
    ([0, 8], "a sequence of 8 tokens exceeds max_seqlen 7"),
    ([], r"must be \[sequences \+ 1\] integers, got \[0\]"),
    ([[0, 5]], r"must be \[sequences \+ 1\] integers, got \[1, 2\]"),
    ([0.0, 5.0], r"must be \[sequences \+ 1\] integers, got \[2\] torch.float32"),
]


@pytest.mark.parametrize("bounds, message", BAD_BOUNDS)
def test_wrong_cu_seqlens(bounds, message):
    with pytest.raises(ValueError, match="cu_seqlens: " + message):
        Layout(torch.tensor(bounds), 9, 7)


def test_sample_ids_are_one_a_sequence():
    with pytest.raises(ValueError, match=r"sample_ids: must be \[1\], one a sequence, got \[2\]"):
        Layout(torch.tensor([0, 5]), 9, 7, torch.tensor([1, 2]))


@pytest.mark.parametrize("tail", [0, 1, 2, 3])
def test_columns_are_aligned_whatever_the_capacity(tail):
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    layout = Layout(bounds, 8 + tail, 8, torch.tensor([7, 9]))
    travelled = layout.to("cpu")
    for rows in (layout.rows(), travelled.rows()):
        for column in rows:
            assert column.shape == (8 + tail,) and column.data_ptr() % 16 == 0
