"""Parameters in parts on several ranks: what an optimiser must know of them.

A part's arithmetic is that of any tensor; norms are sums over all parts, and what needs a whole
matrix gathers it. For a parameter that is in one piece all of this is nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def part(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All parts, on every rank."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def summed(value: Tensor, like: Tensor) -> Tensor:
    """`value` added up over the ranks that share the tensor `like`."""
    if not _is_sharded(like):
        return value
    value = value.clone()
    dist.all_reduce(value, group=like.device_mesh.get_group())
    return value


def gathered(own: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has computed the part that it has of `like`."""
    return whole(assembled(own, like))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor that every rank has, the part that this one has of `like`."""
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    copies = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return copies.redistribute(placements=like.placements).to_local()


def assembled(own: Tensor, like: Tensor) -> Tensor:
    """The tensor in shards of which each rank has the part that it has of `like`."""
    if not _is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    # not by its class, whose import takes a third of a second
    return hasattr(tensor, "full_tensor")
