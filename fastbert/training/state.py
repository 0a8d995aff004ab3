"""Everything a resume needs, on disk: whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.files import atomic_write, sync_folder, writing_failed
from fastbert.training.optimizer import Optimizers

CHECKPOINTS = "checkpoints"
_STATE, _MODEL, _OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
_KEEPER = "keeper"
# checkpoints a run keeps
KEPT = 2
_HASH_BYTES = 1 << 22


@dataclass
class TrainState:
    """How far a run has come; weights and moments lie beside it.

    Attributes:
        step: optimiser steps done.
        tokens: real tokens seen.
        slots: tokens that their batches had room for.
        seconds: on the run's clock.
        position: the batch that comes next.
        corpus: checksum of text and vocabulary, for runs that know it.
        best: the best evaluation so far, for runs that keep it.
        left_out: steps that were done and undone; their batches were not taken again.
        rollbacks: from_step and to_step of each time that steps were undone.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)
    corpus: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    slots: int = 0
    left_out: int = 0
    rollbacks: list[dict[str, int]] = field(default_factory=list)

    @property
    def groups(self) -> int:
        """How many steps' batches have been taken from the text."""
        return self.step + self.left_out


class Keeper(Protocol):
    """What has something of its own in a checkpoint, as `SpikeGuard` has."""

    def raw(self) -> dict[str, Any]:
        """For JSON."""

    def state_tensors(self) -> dict[str, Tensor]:
        """By name, on the host, never written to again."""

    def load(self, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of both."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's `state.json` says.

    Attributes:
        state: of the run.
        files: checksums by name.
        kept: what a keeper's `raw` gave; None without one.
    """

    state: TrainState
    files: dict[str, str]
    kept: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Saved:
        """From a checkpoint's folder; whatever is damaged raises whatever it raises."""
        raw = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if raw.pop("checksum") != _checksum_of(raw):
            raise ValueError(f"{_STATE} does not fit its checksum")
        files, kept = raw.pop("files"), raw.pop(_KEEPER, None)
        return cls(TrainState(**{**raw, "position": Position(**raw["position"])}), files, kept)


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizers: Optimizers,
    *,
    wait: bool = True,
    keeper: Keeper | None = None,
    kept: int = KEPT,
) -> None:
    """Write `checkpoints/step-N`; of those before it the newest stays, should this one be damaged.

    Args:
        folder: of the run.
        state, model, optimizers: what is written.
        wait: return when it is on disk; else a thread writes copies made now, and a failure is
            raised by the next call that does not wait.
        keeper: is written too.
        kept: newest checkpoints that stay, this one among them; at least 2, should it be damaged.

    Raises:
        InputError: it could not be written; earlier checkpoints are untouched.
    """
    try:
        finish_checkpoint()
    except InputError:
        # who waits for this one wants it written, whatever became of the one before
        if not wait:
            raise
    target = checkpoint_path(folder, state.groups)
    if target.exists():
        return
    tensors = {_MODEL: model.state_dict(), _OPTIMIZER: optimizers.state_tensors()}
    if keeper is not None:
        tensors[f"{_KEEPER}.safetensors"] = keeper.state_tensors()
    raw = raw_state(state, keeper)
    if wait:
        _write_checkpoint(target, raw, tensors, kept)
        return
    copies = {
        name: {key: value.detach().to("cpu", copy=True) for key, value in own.items()}
        for name, own in tensors.items()
    }
    _Background(target, raw, copies, kept).start()


def checkpoint_path(folder: Path, groups: int) -> Path:
    """Where a run's checkpoint is; steps that were undone count, so that names ascend with time."""
    return folder / CHECKPOINTS / f"step-{groups:08d}"


def raw_state(state: TrainState, keeper: Keeper | None) -> dict[str, Any]:
    """What `state.json` says but for files."""
    raw = dataclasses.asdict(state)
    return raw if keeper is None else {**raw, _KEEPER: keeper.raw()}


def finish_checkpoint() -> None:
    """Wait for a checkpoint that is being written.

    Raises:
        InputError: it could not be written.
    """
    global _writing
    if _writing is not None:
        _writing.join()
        failure, _writing = _writing.failure, None
        if failure is not None:
            raise failure


class _Background(threading.Thread):
    """Writes one checkpoint; the process does not end before it has."""

    def __init__(
        self,
        target: Path,
        raw: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]],
        kept: int,
    ) -> None:
        super().__init__(name="checkpoint")
        self.arguments = (target, raw, tensors, kept)
        self.failure: InputError | None = None

    def start(self) -> None:
        global _writing
        _writing = self
        super().start()

    def run(self) -> None:
        try:
            _write_checkpoint(*self.arguments)
        except InputError as failure:
            self.failure = failure


_writing: _Background | None = None


def _write_checkpoint(
    target: Path, raw: dict[str, Any], tensors: dict[str, dict[str, Tensor]], kept: int
) -> None:
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, own in tensors.items():
            save_file({k: v.contiguous() for k, v in own.items()}, partial / name)
            with open(partial / name, "rb+") as file:
                os.fsync(file.fileno())
        finish_folder(partial, target, raw, list(tensors), kept)
    except (OSError, SafetensorError) as error:
        raise writing_failed(target, as_os_error(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def finish_folder(
    partial: Path, target: Path, raw: dict[str, Any], names: list[str], kept: int
) -> None:
    """Give a folder whose files are on disk its state, with their checksums, and its name."""
    content = {**raw, "files": {name: _checksum(partial / name) for name in names}}
    with atomic_write(partial / _STATE) as file:
        json.dump({**content, "checksum": _checksum_of(content)}, file, indent=2)
    os.rename(partial, target)
    sync_folder(target.parent)
    for older in checkpoints(target.parent.parent)[: -max(kept, KEPT)]:
        shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    *,
    say: Callable[[str], None] = print,
    keeper: Keeper | None = None,
) -> TrainState:
    """Restore the newest intact checkpoint in place; damaged ones are named and set aside.

    Returns:
        The run's state; a fresh one where the run stopped before its first checkpoint.

    Raises:
        InputError: there are checkpoints, and none is intact.
    """
    finish_checkpoint()

    def restore(path: Path, saved: Saved) -> None:
        model.load_state_dict(load_file(path / _MODEL))
        optimizers.load_state_tensors(load_file(path / _OPTIMIZER))
        if keeper is not None and saved.kept is not None:
            keeper.load(saved.kept, load_file(path / f"{_KEEPER}.safetensors"))

    found = intact_checkpoint(folder, say, restore)
    return TrainState() if found is None else found[1].state


def intact_checkpoint(
    folder: Path,
    say: Callable[[str], None],
    restore: Callable[[Path, Saved], None] = lambda path, saved: None,
) -> tuple[Path, Saved] | None:
    """The newest checkpoint whose files are as they were written; damaged ones are set aside.

    Args:
        folder: of the run.
        say: told what is set aside.
        restore: reads it, where there is more that may be wrong with it.

    Raises:
        InputError: there are checkpoints, and none is intact.
    """
    failures: list[InputError] = []
    for path in reversed(checkpoints(folder)):
        try:
            saved = _read_checkpoint(path, restore)
        except InputError as failure:
            failures.append(failure)
            continue
        for found in failures:
            say(f"{found}; going back to step {saved.state.step}")
        for damaged in checkpoints(folder)[::-1][: len(failures)]:
            # its name is wanted once this step comes again
            damaged.rename(_free_name(damaged.with_name(f"damaged-{damaged.name}")))
        return path, saved
    if failures:
        raise failures[0]
    return None


def _read_checkpoint(path: Path, restore: Callable[[Path, Saved], None]) -> Saved:
    try:
        saved = Saved.read(path)
        for name, expected in saved.files.items():
            if _checksum(path / name) != expected:
                raise ValueError(f"{name} does not fit its checksum")
        restore(path, saved)
        return saved
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged checkpoint: {reason}") from None


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """The model's weights of one of `checkpoints`.

    Raises:
        InputError: it is damaged.
    """
    try:
        raw = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if _MODEL not in raw["files"]:
            raise InputError(
                f"{path}: a checkpoint in shards, of --parallel fsdp, is not read here"
            )
        if raw["files"][_MODEL] != _checksum(path / _MODEL):
            raise ValueError(f"{_MODEL} does not fit its checksum")
        return load_file(path / _MODEL)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: damaged checkpoint: {reason}") from None


def remove_checkpoints(folder: Path) -> None:
    """Drop the checkpoints of a finished run."""
    finish_checkpoint()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run, from old to new."""
    parent = folder / CHECKPOINTS
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name))


def _checksum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def as_os_error(error: BaseException) -> OSError:
    """The operating system's error behind another one."""
    # safetensors wraps the operating system's error in its own text
    if isinstance(error, OSError):
        return error
    full = "No space left" in str(error)
    return OSError(28 if full else 5, str(error))
