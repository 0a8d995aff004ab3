"""Where a run's records go besides metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fastbert.errors import InputError

TENSORBOARD_FOLDER = "tensorboard"
# each needs a package of its name, and so is the extra named
NAMES = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Takes numbers by name."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Write what is left."""


def parse_trackers(names: str) -> list[str]:
    """Read "tensorboard", "wandb" or both with a comma; nothing for none.

    Raises:
        InputError: an unknown name, or one whose package is not installed.
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in NAMES:
            raise InputError(f"--log-to must be {' or '.join(NAMES)}, or both, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log-to {name}: is not installed (pip install 'fastbert[{name}]')")
    return found


def open_trackers(
    names: str, folder: Path, settings: Mapping[str, Any], step: int
) -> list[Tracker]:
    """Those of a run.

    Args:
        names: as for `parse_trackers`.
        folder: of the run.
        settings: of the run, for those that show them.
        step: the run goes on after; what was written of later ones, before a kill, is left out.
    """
    makers: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    return [makers[name](folder, settings, step) for name in parse_trackers(names)]


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)
        if not step:
            lines = (f"    {name}: {value}" for name, value in settings.items())
            self._writer.add_text("settings", "\n".join(lines))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """As Tracker."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As Tracker."""
        self._writer.close()


class WeightsAndBiases:
    """A run of project fastbert, under the folder's name; WANDB_* variables say the rest."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        import wandb  # type: ignore[import-not-found, unused-ignore]

        logging.getLogger("wandb").setLevel(logging.WARNING)
        # one identity for a folder, so that a resumed run goes on where it was
        self._run = wandb.init(
            project="fastbert",
            name=folder.resolve().name,
            id=_identity(folder),
            dir=str(folder),
            config=dict(settings),
            resume="allow",
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """As Tracker."""
        # no step of its own: a run that went back would be refused
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        """As Tracker."""
        self._run.finish()


def scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """A record's finite numbers, those of an evaluation under "heldout/"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, "heldout/" if name == "eval" else f"{name}/")
        elif isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
            yield prefix + name, float(value)


def _identity(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
