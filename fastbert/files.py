"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastbert.errors import InputError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Yield an open file that takes the name `path` only once it is written and on disk.

    Args:
        path: the final name; its folder must exist.
        mode: "w" for UTF-8 text, "wb" for bytes.

    Raises:
        InputError: no space left, or the folder cannot be written to. `path` is unchanged then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise writing_failed(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def writing_failed(path: str | os.PathLike[str], error: OSError) -> InputError:
    """The one line for a file that could not be written."""
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        reason = "no space left on the device; what was there before is unchanged"
    return InputError(f"{path}: cannot write: {reason}")


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut, not only the bytes."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def is_leftover(path: Path) -> bool:
    """Whether a file is a lock, or what a killed process had not finished writing."""
    return path.name == LOCK_FILE or (path.name.startswith(".") and path.name.endswith(".tmp"))


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for this process alone; the lock ends with the process, however it ends.

    Raises:
        InputError: another process holds it.
    """
    path = Path(folder) / LOCK_FILE
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise writing_failed(path, error) from error
    with file:
        try:
            _take_lock(file.fileno())
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"{folder}: another process works here (process {holder}); wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _take_lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:
        # no such locks on this system
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
