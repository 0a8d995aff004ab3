from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.kernels import layout as module
from fastbert.kernels.layout import Layout

LENGTHS = st.lists(
    st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]), st.integers(0, 200)),
    max_size=12,
)


def layout_of(lengths: list[int], tail: int = 0) -> Layout:
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    capacity = int(cu_seqlens[-1]) + tail
    return Layout(cu_seqlens, capacity=capacity, max_seqlen=max(lengths, default=0))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(LENGTHS, st.integers(0, 5))
@example([16, 16, 16], 0)
@example([], 3)
@example([0, 0], 0)
def test_every_real_row_has_one_slot_and_no_slot_leaves_its_sequence(lengths, tail):
    layout = layout_of(lengths, tail)
    bounds = layout.cu_seqlens.tolist()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    rows = [group.rows for group in layout.groups()]
    assert layout.num_tokens() == bounds[-1]
    assert torch.cat([torch.empty(0).long(), *rows]).sort().values.tolist() == list(
        range(bounds[-1])
    )
    for group in layout.groups():
        index = group.index.view(group.sequences, group.length)
        assert (owner[index] == owner[index[:, :1]]).all()
        assert torch.equal(group.index[group.slots], group.rows)
        real = torch.zeros(len(group.index), dtype=torch.bool)
        real[group.slots] = True
        # padding is at the end of a slot row, and its first row stands in for it
        sizes = torch.tensor(lengths)[owner[index[:, 0]]]
        expected = torch.arange(group.length) < sizes[:, None]
        assert torch.equal(real.view_as(index), expected)
        assert torch.equal(index[~expected], index[:, :1].expand_as(index)[~expected])
        if group.padding is None:
            assert real.all()
        else:
            assert torch.equal(group.padding, ~expected)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(LENGTHS)
def test_groups_hold_similar_lengths_only(lengths):
    for group in layout_of(lengths).groups():
        sizes = torch.bincount(group.slots // group.length, minlength=group.sequences)
        longest, shortest = int(sizes.max()), int(sizes.min())
        assert shortest >= min(longest * module.GROUP_FILL, longest - module.GROUP_STEP)
        assert group.length % module.GROUP_STEP == 0
        assert longest <= group.length < longest + module.GROUP_STEP


@settings(deadline=None, derandomize=True, max_examples=25)
@given(LENGTHS)
@example([32, 32, 32])
@example([32, 7, 32])
def test_a_group_is_contiguous_only_where_it_is(lengths):
    for group in layout_of(lengths).groups():
        run = torch.arange(len(group.index)) + group.index[0]
        assert (group.start is not None) == (
            group.padding is None and torch.equal(group.index, run)
        )
        if group.start is not None:
            assert group.start == int(group.index[0])


def test_contiguous_groups_do_occur():
    (group,) = layout_of([32, 32, 32], tail=4).groups()
    assert group.start == 0
    first, second = layout_of([32, 7, 32]).groups()
    assert first.start is None and first.padding is None and second.start is None
    assert second.padding is not None


def test_empty_slots_change_nothing():
    layout = layout_of([20, 3])
    padded = Layout(torch.tensor([0, 20, 23, 23, 23], dtype=torch.int32), 40, 20)
    assert padded.num_tokens() == 23
    for group, same in zip(layout.groups(), padded.groups(), strict=True):
        assert torch.equal(group.index, same.index)


def test_the_plan_is_made_once():
    layout = layout_of([5, 9])
    assert layout.groups() is layout.groups()
