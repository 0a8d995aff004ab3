"""Launch configurations of attention's kernels. Imports no triton."""

from __future__ import annotations

from torch import Tensor

from fastbert.kernels import launch
from fastbert.kernels.launch import Launch

HEAD_DIMS = (32, 64, 96, 128)


# not measured: chosen by what the compiler reports (registers, shared memory, tensor cores) where a
# card has more room than the default may take, or less; a measurement takes their place
ROOMY = ("sm_90", "sm_100")
_EXPECTED = {
    (architecture, *key): chosen
    for architecture in ROOMY
    for key, chosen in {
        ("attention_fwd", 64): Launch(128, 64, num_warps=8, num_stages=3),
        ("attention_fwd_owned_128", 64): Launch(128, 64, num_warps=8, num_stages=2),
        ("attention_bwd_query", 64): Launch(128, 64, num_warps=8, num_stages=2),
        ("attention_bwd_key", 64): Launch(128, 64, num_warps=8, num_stages=2),
        ("attention_bwd_owned_64", 64): Launch(64, 64, num_warps=4, num_stages=1),
        ("attention_fwd_owned_128", 96): Launch(128, 32, num_warps=8, num_stages=2),
        ("attention_fwd_owned_128", 128): Launch(128, 32, num_warps=8, num_stages=2),
        ("attention_bwd_key", 96): Launch(64, 16, num_warps=4, num_stages=1),
        ("attention_bwd_key", 128): Launch(64, 16, num_warps=4, num_stages=1),
        ("attention_bwd_owned_64", 96): Launch(64, 64, num_warps=8, num_stages=1),
        ("attention_bwd_owned_64", 128): Launch(64, 64, num_warps=8, num_stages=1),
    }.items()
}
# registers leave room for two or three programs of four warps, whose products and softmax overlap,
# or for one of eight, which waits for each; and smaller tiles straddle fewer sequences
_EXPECTED["sm_90", "attention_fwd", 64] = Launch(64, 64, num_warps=4, num_stages=3)
_EXPECTED["sm_90", "attention_fwd_owned_128", 64] = Launch(128, 32, num_warps=8, num_stages=2)
_EXPECTED["sm_90", "attention_bwd_query", 64] = Launch(64, 64, num_warps=4, num_stages=2)
_EXPECTED["sm_90", "attention_bwd_key", 64] = Launch(64, 32, num_warps=4, num_stages=2)
_EXPECTED["sm_90", "attention_bwd_owned_128", 64] = Launch(128, 128, num_warps=8, num_stages=1)
_EXPECTED["sm_80", "attention_fwd_owned_128", 64] = Launch(128, 32, num_warps=4, num_stages=2)
for _architecture in ("sm_86", "sm_89"):
    _key = (_architecture, "attention_fwd_owned_128", 64)
    _EXPECTED[_key] = Launch(128, 64, num_warps=8, num_stages=2)
# eight warps of 64 threads leave a thread too few registers
_EXPECTED["gfx942", "attention_bwd_key", 64] = Launch(64, 32, num_warps=4, num_stages=2)
for _head_dim in (96, 128):
    for _kernel in ("attention_bwd_query", "attention_bwd_key"):
        _EXPECTED["gfx942", _kernel, _head_dim] = Launch(64, 16, num_warps=4, num_stages=1)
        # without tensor cores products keep their operands in shared memory
        _EXPECTED["sm_75", _kernel, _head_dim] = Launch(32, 16, num_warps=4, num_stages=1)
    _EXPECTED["sm_80", "attention_bwd_query", _head_dim] = Launch(64, 16, num_warps=8, num_stages=1)


def configure(kernel: str, tensor: Tensor, head_dim: int) -> Launch | None:
    """The launch for the tensor's device and dtype; None where the kernel does not fit there."""
    chosen = launch.measured(kernel, tensor, head_dim)
    if chosen is None and tensor.element_size() == 2:
        chosen = _EXPECTED.get((launch.architecture(tensor.device), kernel, head_dim))
    return chosen or default(kernel, head_dim, tensor.element_size())


def required(kernel: str, tensor: Tensor, head_dim: int) -> Launch:
    """The launch of a kernel that fits everywhere."""
    chosen = configure(kernel, tensor, head_dim)
    assert chosen is not None, kernel
    return chosen


def default(kernel: str, head_dim: int, itemsize: int) -> Launch | None:
    """A launch that is safe on every architecture: no spills, at most 64 KiB of shared memory.

    None for kernels that are not: the other path stands in for them.
    """
    wide = head_dim > 64
    if itemsize == 4:
        # ordinary units multiply, and every operand is twice as large
        if kernel.endswith("_128") or ("bwd_owned" in kernel and head_dim > 32):
            return None
        if kernel.endswith("_64"):
            return Launch(64, 32, num_warps=8, num_stages=1)
        if kernel == "attention_bwd_key" and wide:
            return Launch(32, 16, num_warps=4, num_stages=1)
        return Launch(32, 32, num_warps=4, num_stages=1)
    if kernel == "attention_fwd_owned_64" and wide:
        return Launch(64, 32, num_warps=8, num_stages=2)
    if kernel in ("attention_fwd", "attention_fwd_owned_64"):
        return Launch(64, 32, num_warps=4, num_stages=2)
    if kernel == "attention_fwd_owned_128" and not wide:
        return Launch(128, 32, num_warps=8, num_stages=2)
    if kernel == "attention_bwd_query":
        return Launch(64, 32, num_warps=8 if wide else 4, num_stages=1 if wide else 2)
    if kernel == "attention_bwd_key":
        return Launch(64, 32, num_warps=4 if head_dim == 32 else 8, num_stages=1 if wide else 2)
    if kernel == "attention_bwd_owned_64" and not wide:
        return Launch(64, 64, num_warps=8, num_stages=1)
    return None
