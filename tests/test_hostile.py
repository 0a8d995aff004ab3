"""Disks that fill up or refuse, and bytes that change: one line, and nothing saved is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from test_cli import refused
from tiny import tiny_documents, tiny_tokenizer

from fastbert.cli import main
from fastbert.training.state import CHECKPOINTS

# weights and moments of the tiny model are 5 MB: one checkpoint fits, a second beside it does not
ONE_CHECKPOINT, ROOM = "8m", "64m"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of its own, mounted, or mounted anew, with options such as "size=64k" or "ro"."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.path.ismount(folder):
            words = ["mount", "-o", f"remount,{options}", str(folder)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("this machine does not let a test mount a disk")
        return folder

    yield mounted
    if os.path.ismount(folder):
        # lazily: a tensor that waits for the garbage collector may still map a file of it
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Text and vocabulary of a command."""
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_documents(80)))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    text = [str(tmp_path / "text.txt"), "--doc-sep", "blank"]
    return [*text, "--tokenizer", str(tmp_path / "tok")]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.bin")}


def test_preparing_goes_on_where_the_disk_was_full(disk, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastbert.data.prepare.BLOCK_CHARACTERS", 2000)
    command = ["prepare", *words, "--workers", "1", "--shard-tokens", "1500"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    out = disk("size=48k") / "shards"
    assert "no space left on the device" in refused(capsys, *command, "--out", str(out))
    finished = shards(out)
    assert 0 < len(finished) < len(shards(tmp_path / "whole"))
    disk("size=4m")
    assert main([*command, "--out", str(out)]) == 0
    assert shards(out) == shards(tmp_path / "whole")
    assert "going on after" in capsys.readouterr().out


def test_a_run_survives_a_full_a_refusing_and_a_lying_disk(disk, words, tmp_path, capsys):
    flags = "--size tiny --token-budget 256 --max-seq-len 32 --dtype fp32 --max-steps 5"
    command = ["pretrain", *words, *flags.split(), "--checkpoint-minutes", "1e-9"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    out = disk(f"size={ONE_CHECKPOINT}") / "run"
    line = refused(capsys, *command, "--out", str(out))
    assert "cannot write: no space left on the device" in line
    kept = sorted(path.name for path in (out / CHECKPOINTS).iterdir())
    assert kept == ["step-00000001"]
    disk("ro")
    for other in (["--out", str(out), "--resume"], ["--out", str(out.parent / "new")]):
        assert "cannot write: Read-only file system" in refused(capsys, *command, *other)
    disk(f"rw,size={ROOM}")
    weights = out / CHECKPOINTS / kept[0] / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:])
    line = refused(capsys, *command, "--out", str(out), "--resume")
    assert "damaged checkpoint: model.safetensors does not fit its checksum" in line
    weights.write_bytes(intact)
    assert main([*command, "--out", str(out), "--resume"]) == 0
    ours, theirs = (
        load((folder / "model" / "model.safetensors").read_bytes())
        for folder in (out, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("damage", ["deleted", "a bit flipped"])
def test_a_run_does_not_begin_on_damaged_shards(damage, words, tmp_path, capsys):
    folder = tmp_path / "shards"
    prepared = ["prepare", *words, "--workers", "1", "--shard-tokens", "6000"]
    assert main([*prepared, "--out", str(folder)]) == 0
    shard = max(folder.glob("shard-*.bin"))
    if damage == "deleted":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    command = ["pretrain", str(folder), *words[3:], "--size", "tiny", "--max-steps", "1"]
    line = refused(capsys, *command, "--out", str(tmp_path / "run"))
    assert str(shard) in line and ("missing" in line or "checksum" in line)
    assert not (tmp_path / "run").exists()
