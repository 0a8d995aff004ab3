from __future__ import annotations

import errno
import hashlib
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_examples

from fastbert import files
from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.models import BertForPreTraining
from fastbert.training import state as module
from fastbert.training.optimizer import Optimizers
from fastbert.training.state import (
    CHECKPOINTS,
    TrainState,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)


def trained(seed: int = 0, steps: int = 2) -> tuple[BertForPreTraining, Optimizers]:
    model = BertForPreTraining.from_config(tiny_config(), seed)
    optimizers = Optimizers(model, "muon", learning_rate=1e-2, muon_learning_rate=1e-2)
    for step in range(steps):
        model(tiny_examples([9, 20], seed=step).batch([0, 1])).loss.backward()
        optimizers.step(1.0)
    return model, optimizers


def tree(folder) -> dict[str, bytes]:
    """Every file's content by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


STATE = TrainState(
    step=7, tokens=1234, seconds=5.25, position=Position(1, 2, 3), best={"accuracy": 0.5}
)


def test_a_round_trip_is_bitwise(tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path, STATE, model, optimizers)
    other, fresh = trained(seed=1, steps=0)
    assert load_checkpoint(tmp_path, other, fresh) == STATE
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    moments = fresh.state_tensors()
    assert moments.keys() == optimizers.state_tensors().keys()
    for name, tensor in optimizers.state_tensors().items():
        assert torch.equal(tensor, moments[name]), name


def test_no_checkpoint_yet(tmp_path):
    assert load_checkpoint(tmp_path, *trained(steps=0)) == TrainState()


def test_the_newest_is_kept_and_read(tmp_path):
    model, optimizers = trained()
    # names sort as numbers do
    steps = (9, 10, 100)
    for number, step in enumerate(steps):
        save_checkpoint(tmp_path, TrainState(step=step), model, optimizers)
        kept = steps[max(number - 1, 0) : number + 1]
        assert names(tmp_path) == [f"step-{one:08d}" for one in kept]
    assert load_checkpoint(tmp_path, model, optimizers).step == 100


def test_half_written_checkpoints_and_other_files_are_not_read(tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path, TrainState(step=3), model, optimizers)
    for name in (".step-00000009.tmp", "step-00000009.copy", "thesis"):
        (tmp_path / CHECKPOINTS / name).mkdir()
    assert load_checkpoint(tmp_path, model, optimizers).step == 3
    save_checkpoint(tmp_path, TrainState(step=9), model, optimizers)
    assert load_checkpoint(tmp_path, model, optimizers).step == 9
    assert names(tmp_path) == ["step-00000003", "step-00000009", "step-00000009.copy", "thesis"]


def test_saving_twice_at_a_step_is_saving_once(tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path, TrainState(step=3), model, optimizers)
    before = tree(tmp_path)
    save_checkpoint(tmp_path, TrainState(step=3), model, optimizers)
    assert tree(tmp_path) == before


def rewrite_json(path, change) -> None:
    raw = json.loads(path.read_text())
    raw.pop("checksum")
    changed = change(raw)
    path.write_text(json.dumps({**changed, "checksum": module._checksum_of(changed)}))


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def vouch(path) -> None:
    """Let the state name the file's new checksum."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite_json(
        path.with_name("state.json"), lambda raw: {**raw, "files": {**raw["files"], **sums}}
    )


def drop_tensor(path) -> None:
    tensors = load_file(path)
    tensors.pop("encoder.layers.0.qkv.weight")
    save_file(tensors, path)
    vouch(path)


def misshape(path) -> None:
    tensors = load_file(path)
    tensors["encoder.layers.0.qkv.weight/momentum_buffer"] = torch.zeros(3)
    save_file(tensors, path)
    vouch(path)


DAMAGES = {
    "no state": lambda folder: (folder / "state.json").unlink(),
    "state cut": lambda folder: halve(folder / "state.json"),
    "state is a list": lambda folder: (folder / "state.json").write_text("[]"),
    "no position": lambda folder: rewrite_json(
        folder / "state.json", lambda raw: {"step": raw["step"], "files": raw["files"]}
    ),
    "unknown entry": lambda folder: rewrite_json(
        folder / "state.json", lambda raw: raw | {"mood": 3}
    ),
    "a bit of the state": lambda folder: flip_a_bit(folder / "state.json"),
    "a bit of the weights": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "a bit of the moments": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: halve(folder / "model.safetensors"),
    "a weight missing": lambda folder: drop_tensor(folder / "model.safetensors"),
    "no moments": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "moments cut": lambda folder: halve(folder / "optimizer.safetensors"),
    "moments empty": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a moment misshapen": lambda folder: misshape(folder / "optimizer.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line(damage, tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path, STATE, model, optimizers)
    folder = tmp_path / CHECKPOINTS / "step-00000007"
    DAMAGES[damage](folder)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"damaged checkpoint: \S") as failure:
        load_checkpoint(tmp_path, *trained(steps=0))
    assert str(failure.value).startswith(str(folder)) and "\n" not in str(failure.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_intact_one_is_taken_and_said(damage, tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path, TrainState(step=3), model, optimizers)
    save_checkpoint(tmp_path, STATE, *trained(seed=5))
    folder = tmp_path / CHECKPOINTS / "step-00000007"
    DAMAGES[damage](folder)
    other, fresh = trained(seed=1, steps=0)
    said: list[str] = []
    assert load_checkpoint(tmp_path, other, fresh, say=said.append) == TrainState(step=3)
    assert len(said) == 1 and said[0].startswith(f"{folder}: damaged checkpoint: ")
    assert said[0].endswith("; going back to step 3") and "\n" not in said[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    # set aside, not lost, and its name is free for the step's second coming
    assert names(tmp_path) == ["damaged-step-00000007", "step-00000003"]
    save_checkpoint(tmp_path, STATE, model, optimizers)
    assert load_checkpoint(tmp_path, other, fresh) == STATE


def test_a_background_write_holds_what_was_then(tmp_path):
    model, optimizers = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path, STATE, model, optimizers, wait=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    other, fresh = trained(seed=1, steps=0)
    assert load_checkpoint(tmp_path, other, fresh) == STATE
    for name, tensor in before.items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_background_failure_is_raised_by_the_next_call(tmp_path, monkeypatch):
    model, optimizers = trained()
    with monkeypatch.context() as patch:
        FULL["weights"](patch)
        save_checkpoint(tmp_path, STATE, model, optimizers, wait=False)
        with pytest.raises(InputError, match="no space left on the device"):
            module.finish_checkpoint()
    module.finish_checkpoint()
    save_checkpoint(tmp_path, STATE, model, optimizers)
    assert load_checkpoint(tmp_path, model, optimizers) == STATE


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in_rust(*_: object, **__: object) -> None:
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


FULL = {
    "folder": lambda patch: patch.setattr(module.Path, "mkdir", no_space),
    "weights": lambda patch: patch.setattr(module, "save_file", no_space),
    "weights, from safetensors": lambda patch: patch.setattr(module, "save_file", no_space_in_rust),
    "fsync": lambda patch: patch.setattr(module.os, "fsync", no_space),
    "state": lambda patch: patch.setattr(files.os, "replace", no_space),
    "rename": lambda patch: patch.setattr(module.os, "rename", no_space),
}


@pytest.mark.parametrize("stage", FULL)
def test_a_full_disk_leaves_the_checkpoint_before_and_no_rest(stage, tmp_path, monkeypatch):
    model, optimizers = trained()
    save_checkpoint(tmp_path, STATE, model, optimizers)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        FULL[stage](patch)
        with pytest.raises(InputError, match="no space left on the device") as failure:
            save_checkpoint(tmp_path, TrainState(step=8), model, optimizers)
    assert "\n" not in str(failure.value)
    assert tree(tmp_path) == before
    assert [p.name for p in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000007"]
    assert load_checkpoint(tmp_path, model, optimizers) == STATE


def test_checkpoints_of_a_finished_run_go(tmp_path):
    save_checkpoint(tmp_path, STATE, *trained())
    (tmp_path / "model").mkdir()
    remove_checkpoints(tmp_path)
    remove_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
