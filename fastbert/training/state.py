"""Everything a resume needs, on disk: whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastbert.data.stream import Position
from fastbert.errors import InputError
from fastbert.files import atomic_write, writing_failed
from fastbert.training.optimizer import Optimizers

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
_STATE, _MODEL, _OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"


@dataclass
class TrainState:
    """How far a run has come; weights and moments lie beside it.

    Attributes:
        step: optimiser steps done.
        tokens: real tokens seen.
        seconds: on the run's clock.
        position: the batch that comes next.
        best: the best evaluation so far, for runs that keep it.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)
    best: dict[str, Any] = field(default_factory=dict)


def check_run(out: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool) -> None:
    """Look whether `claim_run` would take a folder, before any work is done for it.

    Raises:
        InputError: the folder holds another run or other files, or there is nothing to resume.
    """
    folder = Path(out)
    if resume:
        _check_same(folder, settings)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"--out {out}: is no folder; name a new one")
    elif (folder / RUN_FILE).exists():
        raise InputError(
            f"--out {out}: holds a run already ({RUN_FILE}); --resume goes on with it, "
            "or name another folder"
        )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {out}: is not empty; name a new folder")


def claim_run(out: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool) -> Path:
    """Make a run's folder and write `run.json`, or open the run that is there.

    Args:
        out: the folder.
        settings: of the run; a resumed run must have been started with the same.
        resume: go on with the run in `out`.

    Raises:
        InputError: as `check_run`, or the folder cannot be written to.
    """
    check_run(out, settings, resume=resume)
    folder = Path(out)
    if resume:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(folder, error) from error
    with atomic_write(folder / RUN_FILE) as file:
        json.dump(settings, file, indent=2)
        file.write("\n")
    return folder


def save_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, optimizers: Optimizers
) -> None:
    """Write `checkpoints/step-N`; the one before it is removed once this one is complete.

    Raises:
        InputError: it could not be written; earlier checkpoints are untouched.
    """
    target = folder / CHECKPOINTS / f"step-{state.step:08d}"
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / _MODEL)
        save_file(
            {k: v.contiguous() for k, v in optimizers.state_tensors().items()},
            partial / _OPTIMIZER,
        )
        for name in (_MODEL, _OPTIMIZER):
            with open(partial / name, "rb+") as file:
                os.fsync(file.fileno())
        with atomic_write(partial / _STATE) as file:
            json.dump(dataclasses.asdict(state), file, indent=2)
        os.rename(partial, target)
    except (OSError, SafetensorError) as error:
        raise writing_failed(target, _as_os_error(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Optimizers) -> TrainState:
    """Restore the newest checkpoint in place.

    Returns:
        The run's state; a fresh one where the run stopped before its first checkpoint.

    Raises:
        InputError: the checkpoint is damaged.
    """
    found = _checkpoints(folder)
    if not found:
        return TrainState()
    newest = found[-1]
    try:
        raw = json.loads((newest / _STATE).read_text(encoding="utf-8"))
        model.load_state_dict(load_file(newest / _MODEL))
        optimizers.load_state_tensors(load_file(newest / _OPTIMIZER))
        return TrainState(**{**raw, "position": Position(**raw["position"])})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{newest}: damaged checkpoint: {reason}") from None


def remove_checkpoints(folder: Path) -> None:
    """Drop the checkpoints of a finished run."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    run_file = folder / RUN_FILE
    try:
        before = json.loads(run_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--resume: {folder} holds no run ({RUN_FILE} is missing)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{run_file}: unreadable: {error}") from None
    if not isinstance(before, dict):
        raise InputError(f"{run_file}: unreadable: expected a JSON object")
    # a run may have been moved, or its folder spelt in another way
    names = settings.keys() - {"out"}
    changed = sorted(
        name for name in names if before.get(name) != json.loads(json.dumps(settings[name]))
    )
    if changed:
        name = changed[0]
        raise InputError(
            f"--resume: {folder} was started with other settings: {name} was "
            f"{before.get(name)!r}, now {settings[name]!r}"
        )


def _checkpoints(folder: Path) -> list[Path]:
    parent = folder / CHECKPOINTS
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name))


def _as_os_error(error: Exception) -> OSError:
    # safetensors wraps the operating system's error in its own text
    if isinstance(error, OSError):
        return error
    full = "No space left" in str(error)
    return OSError(28 if full else 5, str(error))
