"""What leaves the host without anybody waiting leaves from page-locked memory."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from pretend_gpu import OnTheCpu
from tiny import tiny_examples
from torch import Tensor

from fastbert.kernels.ops import Rng
from fastbert.packing import Capacity, PackedBatch
from fastbert.training.step import Inputs


@pytest.fixture
def locked(monkeypatch) -> list[int]:
    """Addresses of what was page-locked; the copies are ordinary memory."""
    made: list[int] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        made.append(copied.data_ptr())
        return copied

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    return made


class Copies(OnTheCpu):
    """Notes which memory copies to "cuda" leave from."""

    def __init__(self, left: list[int]) -> None:
        super().__init__()
        self.left = left

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        if function is Tensor.to and str(arguments[1]).startswith("cuda"):
            self.left.append(arguments[0].data_ptr())
        return super().__torch_function__(function, kinds, arguments, options)


def batch() -> PackedBatch:
    packed = tiny_examples([7, 3]).batch(range(2), Capacity(16, 3, 8))
    packed.sample_ids = torch.arange(3)
    return packed


def tensors(packed: PackedBatch) -> int:
    fields = (getattr(packed, field.name) for field in dataclasses.fields(packed))
    return sum(isinstance(value, Tensor) for value in fields)


def test_a_batch_and_its_layout_leave_from_page_locked_memory(locked):
    left: list[int] = []
    with Copies(left):
        batch().to("cuda", non_blocking=True)
    # of the layout cu_seqlens, sample ids, rows and tiles
    assert len(left) == tensors(batch()) + 4 and left == locked


def test_so_do_a_step_s_numbers(locked):
    left: list[int] = []
    with Copies(left):
        Inputs.send([batch()], Rng(1, 2), torch.device("cuda"))
    assert len(left) == tensors(batch()) + 6 and left == locked


def test_a_copy_that_is_waited_for_and_one_on_a_cpu_lock_nothing(locked):
    with OnTheCpu():
        batch().to("cuda")
    target, source = batch(), batch()
    source.input_ids += 1
    target.to("cpu", non_blocking=True)
    target.copy_(source)
    assert torch.equal(target.input_ids, source.input_ids) and not locked


class OnAGpu(Tensor):
    """Says that it is on a GPU, and is on the CPU."""

    device = torch.device("cuda")


def test_a_captured_batch_is_written_from_page_locked_memory(locked):
    target, source = batch(), batch()
    source.input_ids += 1
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if isinstance(value, Tensor):
            setattr(target, field.name, value.as_subclass(OnAGpu))
    plan = copy.copy(source.layout)
    target.__dict__["layout"] = plan
    target.copy_(source)
    assert torch.equal(target.input_ids.as_subclass(Tensor), source.input_ids)
    assert len(locked) == tensors(source)
