"""How many kernels an encoder layer launches, counted where operators are dispatched."""

from __future__ import annotations

from kernel_harness import DEVICE, runs_kernels

from fastbert.bench import layer_kernels

pytestmark = runs_kernels


def test_a_layer_launches_few_kernels():
    found = layer_kernels.count(DEVICE)
    assert {way: len(names) <= layer_kernels.MOST[way] for way, names in found.items()} == {
        "forward": True,
        "backward": True,
    }, found
    # attention is one kernel forward, and one backward where tiles own their sequences
    for way, kernel in (
        ("forward", "_attention_fwd_kernel"),
        ("backward", "_attention_bwd_owned_kernel"),
    ):
        assert [name for name in found[way] if "attention" in name] == [kernel]
    assert "forward" in layer_kernels.line(found)
