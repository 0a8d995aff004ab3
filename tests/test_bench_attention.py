from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from fastbert.bench import __main__ as bench
from fastbert.bench import attention, attention_peers
from fastbert.kernels import ops


def test_lengths_fill_the_tokens_and_stay_within_their_name():
    found = dict(attention.distributions(16384))
    assert [name for name in found if name.isdigit()] == [str(n) for n in attention.UNIFORM]
    for name, lengths in found.items():
        assert sum(lengths) <= 16384 and min(lengths) >= 1
        if " to " in name:
            least, most = map(int, name.split(" to "))
            assert max(lengths) <= most and min(lengths[:-1]) >= least
            assert sum(lengths) == 16384
    assert 40 <= sum(found["16 to 128"]) / len(found["16 to 128"]) <= 50
    assert found["8192 and ones"][:2] == [8192, 1]


@pytest.mark.parametrize("lengths", [[7, 3, 5], [4, 4]])
def test_padded_peers_compute_what_we_compute(lengths):
    batch = attention.batch_of(lengths, sum(lengths) + 2, torch.device("cpu"))
    batch = attention_peers.Batch(batch.qkv.double(), lengths, batch.layout)
    with ops.use_backend("reference"):
        ours = attention._ours(0.0)(batch)[0]()
    call, leaves = attention_peers.padded(SDPBackend.MATH)(batch)
    theirs = call().transpose(1, 2)
    rows = torch.cat([theirs[number, :length] for number, length in enumerate(lengths)])
    error = (rows - ours[: sum(lengths)]).abs().max()
    assert error <= 8 * torch.finfo(torch.float64).eps
    gradients = torch.autograd.grad(call().sum(), leaves)
    assert len(gradients) == 3 and all(g.abs().sum() > 0 for g in gradients)


def test_a_mask_is_refused_by_name_where_a_backend_takes_none():
    batch = attention.batch_of([7, 3], 10, torch.device("cpu"))
    with pytest.raises(ValueError, match="takes no mask"):
        attention_peers.padded(SDPBackend.FLASH_ATTENTION)(batch)


def test_a_row_says_what_was_skipped_and_what_refused():
    row = attention.Row("64", "forward", 0.5, False, 2.0, {"ours": 4.0, "peer": 6.0}, {"x": "no"})
    assert "500.0 TFLOP/s  peer 1.50" in attention.line(row) and "x: skipped, no" in attention.line(
        row
    )
    refused = attention.Row("64", "forward", 1.5, True)
    assert "refused: 1.50 of the error bound" in attention.line(refused)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_parity_and_kernel_counts_are_printed(monkeypatch, capsys):
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    found = [("20 to 30", [20, 30])]
    monkeypatch.setattr(attention, "distributions", lambda tokens: iter(found))
    monkeypatch.setattr(attention, "CPU_TOKENS", 50)
    assert bench.main(["attention"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU: attention's speed needs one")
    assert "8 forward (goal 8)" in printed and "varlen_attn" in printed
    assert "times as fast as a loop over 2 sequences" in printed


def test_the_loop_that_groups_are_measured_against_computes_the_same():
    lengths = [7, 3, 5]
    batch = attention.batch_of(lengths, 15, torch.device("cpu"))
    batch = attention_peers.Batch(batch.qkv.double(), lengths, batch.layout)
    with ops.use_backend("reference"):
        ours = attention._ours(0.0)(batch)[0]()
    theirs = attention_peers.loop(batch)[0]()
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(torch.float64).eps
