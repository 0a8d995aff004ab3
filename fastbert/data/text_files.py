"""Which files a user's paths stand for, and their lines, decoded."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from fastbert.errors import InputError

_FOLDER_PATTERN = re.compile(r".*\.(txt|jsonl|gz|zst|parquet)|.*wiki_\d+", re.IGNORECASE)
_NOT_TEXT = frozenset({".json", ".zip", ".bz2", ".xz", ".7z", ".pdf", ".docx", ".arrow"})
_ACCEPTED = ".txt, .jsonl (a `text` field a line), .gz and .zst of either, .parquet"
# in bytes; memory is bounded whatever the text
LONGEST_LINE = 1 << 26


class Line(NamedTuple):
    """One decoded line, without its line end."""

    text: str
    number: int  # counted from 1


def find_files(
    paths: Sequence[str | os.PathLike[str]], *, say: Callable[[str], None] = print
) -> list[Path]:
    """The text files that paths, globs and folders stand for; each once.

    Raises:
        InputError: a path, glob or folder without a readable file, or an empty file named outright.
    """
    if not paths:
        raise InputError(f"no text was named; files, globs or folders of {_ACCEPTED} are wanted")
    found: dict[Path, Path] = {}
    repeated = empty = 0
    for name in paths:
        if is_hub_name(name):
            found.setdefault(Path(name), Path(name))
            continue
        outright = Path(name).is_file()
        for file in _expand(name):
            # a pipe has no size
            if file.is_file() and file.stat().st_size == 0:
                if outright:
                    raise InputError(f"{file}: the file is empty")
                empty += 1
            elif found.setdefault(file.resolve(), file) is not file:
                repeated += 1
    if empty:
        say(f"corpus: {counted(empty, 'empty file')} skipped")
    if repeated:
        say(f"corpus: {counted(repeated, 'file')} named more than once, read once")
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: every file found is empty")
    return list(found.values())


def _expand(name: str | os.PathLike[str]) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        below = sorted(
            file
            for file in path.rglob("*")
            if _FOLDER_PATTERN.fullmatch(file.name)
            and not file.name.startswith(".")
            and file.is_file()
        )
        if not below:
            raise InputError(f"{path}: no text files in this folder; {_ACCEPTED} are read")
        return below
    if path.exists():
        if path.suffix.lower() in _NOT_TEXT:
            raise InputError(f"{path}: {path.suffix} is not read; {_ACCEPTED} are")
        return [path]
    if glob.has_magic(str(name)):
        matches = sorted(Path(match) for match in glob.glob(str(name), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise InputError(f"{name}: no file matches")
        return [file for match in files for file in _expand(match)]
    raise InputError(f"{path}: no such file or folder")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether this names a data set of the Hugging Face hub, or one in its form: hf:NAME."""
    return str(name).startswith("hf:")


def _open(path: Path) -> IO[bytes]:
    packing = path.suffix.lower()
    if packing == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if packing == ".zst":
        return io.BufferedReader(
            zstandard()
            .ZstdDecompressor()
            .stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)
        )
    return open(path, "rb")


def zstandard() -> Any:
    """The library that unpacks .zst.

    Raises:
        InputError: it is not installed; names the extra.
    """
    try:
        import zstandard as library
    except ImportError:
        raise InputError(".zst needs zstandard: pip install 'fastbert[data]'") from None
    return library


def _raw_lines(path: Path) -> Iterator[bytes]:
    packing = path.suffix.lower()
    broken: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    if packing == ".zst":
        broken = (zstandard().ZstdError,)
    try:
        with _open(path) as file:
            # only b"\n" ends a line here, as it should
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise InputError(
                        f"{path}: a line of more than {LONGEST_LINE >> 20} MiB; break it up"
                    )
                yield line
    except broken as error:
        raise InputError(f"{path}: broken {packing[1:]} archive: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error


def decoded_lines(path: Path, encoding: str = "utf-8") -> Iterator[Line]:
    """Stream the lines of a file, plain or .gz; a byte order mark is dropped.

    Args:
        path: of the file.
        encoding: one in which b"\\n" ends a line.

    Raises:
        InputError: bytes of another encoding (with their offset in the unpacked file), a broken
            archive, or a file that cannot be read.
    """
    offset = 0
    for number, raw in enumerate(_raw_lines(path), 1):
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError as error:
            where = f"{path}: byte {offset + error.start}"
            if encoding != "utf-8":
                raise InputError(f"{where}: not {encoding}") from error
            raise InputError(f"{where}: not UTF-8, the encoding text must have") from error
        offset += len(raw)
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield Line(text.rstrip("\r\n"), number)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded; JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def counted(number: int, noun: str) -> str:
    """The number with its noun, e.g. '1 file' or '3 files'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
