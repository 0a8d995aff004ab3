from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastbert.kernels import groups as module
from fastbert.kernels.groups import Group, plan_groups

EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
LENGTHS = st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 200)), max_size=12)
few = settings(deadline=None, derandomize=True, max_examples=25)


def groups_of(lengths: list[int], rounded: bool) -> list[Group]:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return plan_groups(bounds, rounded=rounded)


def sizes_of(group: Group) -> list[int]:
    """Real tokens of each of its sequences."""
    return torch.bincount(group.slots // group.length, minlength=group.sequences).tolist()


@few
@given(LENGTHS, st.booleans())
@example([16, 16, 16], True)
@example([16, 7, 16, 7], False)
@example([], True)
@example([0, 0], False)
def test_every_real_row_has_one_slot_and_no_slot_leaves_its_sequence(lengths, rounded):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    groups = groups_of(lengths, rounded)
    rows = torch.cat([torch.empty(0).long(), *(group.rows for group in groups)])
    assert rows.sort().values.tolist() == list(range(sum(lengths)))
    for group in groups:
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


@few
@given(LENGTHS)
def test_rounded_groups_compute_few_scores_for_nothing(lengths):
    for group in groups_of(lengths, rounded=True):
        longest = max(sizes_of(group))
        assert group.length % module.GROUP_STEP == 0
        assert longest <= group.length < longest + module.GROUP_STEP
        widths = [-(-size // module.GROUP_STEP) * module.GROUP_STEP for size in sizes_of(group)]
        wasted = sum(group.length**2 - width**2 for width in widths)
        assert wasted <= module.MERGED_SCORES


def test_a_few_shorter_sequences_join_a_block_and_many_do_not():
    assert [g.sequences for g in groups_of([32, 9, 30, 16], rounded=True)] == [4]
    assert [g.sequences for g in groups_of([32, 9, 30, 16, 12], rounded=True)] == [2, 3]
    # as many as there are, not as many as are still cheap
    assert [g.sequences for g in groups_of([32, *[16] * 20], rounded=True)] == [1, 20]


@few
@given(LENGTHS)
def test_groups_that_are_not_rounded_have_no_padding_and_long_sequences_are_alone(lengths):
    for group in groups_of(lengths, rounded=False):
        assert group.padding is None
        assert group.sequences == 1 or group.length <= module.SHARED_LENGTH
        if group.length > module.SHARED_LENGTH:
            assert group.start is not None


def test_short_sequences_of_one_length_share_a_block():
    groups = groups_of([7, 40, 7, 40, 9, 7], rounded=False)
    assert [(group.length, group.sequences) for group in groups] == [
        (40, 1), (40, 1), (9, 1), (7, 3)
    ]  # fmt: skip


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("length", [8, 16, 32, 128, 200])
def test_a_block_is_no_larger_than_a_cache_holds(length, rounded):
    for group in groups_of([length] * 300, rounded):
        scores = group.sequences * group.length**2
        assert group.sequences == 1 or scores <= module.BLOCK_SCORES
    # and is filled as far as that goes
    full = max(1, module.BLOCK_SCORES // group.length**2)
    assert len(groups_of([length] * 300, rounded)) <= -(-300 // min(full, 300)) or length > 32


@few
@given(LENGTHS, st.booleans())
@example([32, 32, 32], True)
@example([32, 7, 32], True)
@example([7, 7], False)
def test_a_group_is_contiguous_only_where_it_is(lengths, rounded):
    for group in groups_of(lengths, rounded):
        run = torch.arange(len(group.index)) + group.index[0]
        assert (group.start is not None) == (
            group.padding is None and torch.equal(group.index, run)
        )
        if group.start is not None:
            assert group.start == int(group.index[0])


def test_contiguous_groups_do_occur():
    (group,) = groups_of([32, 32, 32], rounded=True)
    assert group.start == 0
    first, second = groups_of([32, 7, 7, 7, 32], rounded=True)
    assert first.start is None and first.padding is None and second.start is None
    assert second.padding is not None


@pytest.mark.parametrize("rounded", [False, True])
def test_empty_slots_change_nothing(rounded):
    groups, padded = (groups_of(lengths, rounded) for lengths in ([20, 3], [20, 3, 0, 0]))
    for group, same in zip(groups, padded, strict=True):
        assert torch.equal(group.index, same.index)
