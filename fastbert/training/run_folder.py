"""A run's folder: new or its own, and the settings that it was started with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastbert.errors import InputError
from fastbert.files import atomic_write, is_leftover, writing_failed

RUN_FILE = "run.json"


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
    elif folder.exists() and not all(map(is_leftover, folder.iterdir())):
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
