from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from fastbert.bench import __main__ as bench
from fastbert.bench import attention, attention_cpu, attention_peers, attention_steps
from fastbert.kernels import ops


def test_lengths_fill_the_tokens_and_stay_within_their_name():
    found = dict(attention.distributions(16384))
    assert [name for name in found if name.isdigit()] == [str(n) for n in attention_steps.UNIFORM]
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
        ours = attention.ours(0.0)(batch)[0]()
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
def test_without_a_gpu_parity_and_kernel_counts_are_printed(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    found = [("20 to 30", [20, 30])]
    monkeypatch.setattr(attention_cpu, "LENGTHS", ["20 to 30"])
    monkeypatch.setattr(attention, "distributions", lambda tokens: iter(found))
    monkeypatch.setattr(attention, "CPU_TOKENS", 50)
    assert bench.main(["attention", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU: attention's speed needs one")
    assert "8 forward (goal 8)" in printed and "varlen_attn" in printed
    assert printed.count("times as fast as a loop over 2 sequences") == 4
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["dtype"], row["direction"]) for row in written["rows"]] == [
        (dtype, direction)
        for dtype in ("fp32", "bf16")
        for direction in ("forward", "forward + backward")
    ]
    assert len(written["layer_kernels"]["forward"]) == 8
    for row in written["rows"]:
        times = row["loop_ms"]["median"] / row["ours_ms"]["median"]
        assert row["speedup"]["median"] == times and not row["refused"]


def test_a_mixture_outside_the_error_rule_is_not_timed(monkeypatch):
    def doubled(dropout_p):
        prepare = attention_steps.ours(dropout_p)

        def wrong(batch):
            call, leaves = prepare(batch)
            return lambda: 2.0 * call(), leaves

        return wrong

    monkeypatch.setattr(attention_cpu, "ours", doubled)
    monkeypatch.setattr(attention_cpu, "_timed", None)
    found = list(attention_cpu.rows({"7 to 20": [20, 7]}))
    assert len(found) == 4 and all(row.refused and row.ours_ms is None for row in found)
    assert "refused: " in found[0].line()


def test_the_loop_that_groups_are_measured_against_computes_the_same():
    lengths = [7, 3, 5]
    batch = attention.batch_of(lengths, 15, torch.device("cpu"))
    batch = attention_peers.Batch(batch.qkv.double(), lengths, batch.layout)
    with ops.use_backend("reference"):
        ours = attention.ours(0.0)(batch)[0]()
    theirs = attention_peers.loop(batch)[0]()
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(torch.float64).eps
