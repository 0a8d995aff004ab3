"""Ranks on gloo: the same step for any split, elastic restarts, a rank that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import ErrorRule
from safetensors.torch import load_file
from tiny import tiny_documents, tiny_tokenizer

from fastbert.cli import main
from fastbert.errors import InputError
from fastbert.training.loop import default_device
from fastbert.training.parallel import PARALLEL, Ranks

GRADIENTS = """if True:
    import sys
    from itertools import islice
    import torch
    from safetensors.torch import save_file
    sys.path.insert(0, sys.argv[1])
    from tiny import stirred, tiny_config, tiny_corpus, tiny_tokenizer
    from fastbert.data.loader import Loader
    from fastbert.data.objectives import Objective
    from fastbert.data.regions import Part
    from fastbert.data.stream import StreamConfig
    from fastbert.models import BertForPreTraining, Targets
    from fastbert.training.loop import accumulate
    from fastbert.training.parallel import Ranks

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    ranks = Ranks.from_environment(cpu)
    tokenizer = tiny_tokenizer()
    dtype = torch.float64 if sys.argv[3] == "fp64" else torch.float32
    config = StreamConfig(Objective("sop"), token_budget=128, max_seq_len=40)
    model = stirred(BertForPreTraining.from_config(tiny_config(vocab_size=tokenizer.vocab_size)))
    model.to(dtype)
    share = -(-4 // ranks.count)
    deal = {"group": 4, "rank": ranks.rank, "ranks": ranks.count}
    with Loader([Part.whole(tiny_corpus())], tokenizer, config, **deal) as loader:
        batches = [batch for batch, _ in islice(loader, share)]
    agreed = ranks.agree(Targets.of(*batches), sum(b.num_tokens for b in batches), 5.0, False)
    result = accumulate(
        model, batches, device=cpu, dtype=torch.float32, ranks=ranks, targets=agreed.targets
    )
    if ranks.first:
        tensors = {name: p.grad for name, p in model.named_parameters()}
        counts = [agreed.targets.masked, agreed.targets.labelled, agreed.tokens]
        sums = {name: value.double() for name, value in result.sums.items()}
        save_file(tensors | {"counts": torch.tensor(counts)} | sums, sys.argv[2])
    ranks.close()
"""


def start(root: Path, ranks: int, *words: str, **options) -> subprocess.Popen:
    """`torchrun` with so many processes, or the program alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", port]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *(torchrun if ranks > 1 else []), *words]
    return subprocess.Popen(command, env=environment, text=True, **options)


def run(root: Path, ranks: int, *words: str) -> str:
    process = start(root, ranks, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


def test_every_process_of_a_machine_has_its_own_gpu(monkeypatch):
    current = [0]
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **_: seen.append((backend, current[-1]))
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 7)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    device = default_device()
    assert device == torch.device("cuda", 3)
    assert Ranks.from_environment(device).rank == 7
    # joined after the GPU was chosen
    assert seen == [("nccl", 3)]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(InputError, match="process 5 of this machine has no GPU, there are 4"):
        default_device()


def test_alone_the_current_gpu_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("changed"))
    assert default_device() == torch.device("cuda")


def test_a_step_is_the_same_for_any_number_of_ranks(root, tmp_path):
    """1 x 4, 2 x 2, 3 x (2, 1, 1) and 4 x 1 micro-batches, by the error rule against fp64."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = {}
    for name, ranks, dtype in (
        ("oracle", 1, "fp64"),
        ("1", 1, "fp32"),
        ("2", 2, "fp32"),
        ("3", 3, "fp32"),
        ("4", 4, "fp32"),
    ):
        out = tmp_path / f"{name}.safetensors"
        run(root, ranks, str(script), str(root / "tests"), str(out), dtype)
        found[name] = load_file(out)
    for ranks in "234":
        assert torch.equal(found[ranks]["counts"], found["1"]["counts"])
        rule = ErrorRule()
        for name, exact in found["oracle"].items():
            if name != "counts" and not name.endswith("correct"):
                ours, plain = (found[n][name].float() for n in (ranks, "1"))
                rule.compare(name, ours, plain, exact.double())
        rule.assert_within(seeds=1)
        for name in ("masked_lm_correct", "sequence_correct"):
            assert torch.equal(found[ranks][name], found["1"][name])


def test_a_lost_rank_is_told_from_other_errors(monkeypatch):
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    ranks = Ranks(1, 2)
    lost = "[/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer\nat x"
    gone = "rank 1 of 2: another rank is gone"
    with pytest.raises(InputError, match=gone) as failure, ranks.watched():
        raise RuntimeError(lost)
    assert "--resume goes on" in str(failure.value) and "\n" not in str(failure.value)
    for alone, message in ((ranks, "shapes differ"), (Ranks(), lost)):
        with pytest.raises(RuntimeError) as other, alone.watched():
            raise RuntimeError(message)
        assert not isinstance(other.value, InputError)


def test_the_first_rank_alone_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr("fastbert.training.pretrain.pretrain", lambda *_, **__: {})
    words = ["pretrain", "x.txt", "--tokenizer", "t", "--out", "o", "--max-steps", "1"]
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
        assert ("--resume" in capsys.readouterr().out) is said


@pytest.fixture
def words(tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_documents(60)))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    flags = "--size tiny --token-budget 256 --max-seq-len 32 --accumulation 4 --dtype fp32"
    words = ["-m", "fastbert", "pretrain", str(tmp_path / "text.txt"), "--doc-sep", "blank"]
    return [*words, "--tokenizer", str(tmp_path / "tok"), *flags.split()]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_stopped_on_two_ranks_goes_on_with_one_and_with_three(root, tmp_path, words, parallel):
    """The data order is the same: after each stop the position is that of an undisturbed run."""
    import json

    run(root, 1, *words, "--max-steps", "12", "--out", str(tmp_path / "whole"))
    out = tmp_path / "elastic"
    go = [
        *words,
        "--parallel",
        parallel,
        "--max-steps",
        "12",
        "--checkpoint-minutes",
        "1e-9",
        "--out",
        str(out),
    ]
    for ranks, more in ((2, []), (1, ["--resume"]), (3, ["--resume"])):
        process = start(root, ranks, *go, *more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        before = len(list((out / "checkpoints").glob("step-*")))
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and ranks != 3:
            steps = sorted((out / "checkpoints").glob("step-*"))
            if len(steps) > 1 and (before == 0 or steps[-1].name > "step-00000005"):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        process.communicate(timeout=600)
    whole, elastic = (
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "elastic")
    )
    assert whole["steps"] == elastic["steps"] == 12
    assert whole["tokens"] == elastic["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_killed_rank_ends_all_and_a_restart_goes_on(root, tmp_path, words, parallel):
    out = tmp_path / "run"
    go = [
        *words,
        "--parallel",
        parallel,
        "--max-steps",
        "400",
        "--checkpoint-minutes",
        "1e-9",
        "--out",
        str(out),
    ]
    process = start(root, 2, *go, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    # what is left of it says so, in one line
    assert "another rank is gone" in printed and "InputError" not in printed
    step = sorted((out / "checkpoints").glob("step-*"))[-1].name
    again = start(root, 2, *go, "--resume", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None or again.poll() is None:
        if sorted((out / "checkpoints").glob("step-*"))[-1].name > step:
            again.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    printed, _ = again.communicate(timeout=300)
    assert "saved" in printed
