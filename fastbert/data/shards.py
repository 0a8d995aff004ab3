"""Token shards on disk: memory-mapped ids with the starts of sentences and documents.

A shard is one file: magic, length of the header, header (JSON), then three arrays, each at a
multiple of 64 bytes: ids [tokens] uint16 or uint32, sentence starts [sentences + 1] uint32 into
ids, document starts [documents + 1] uint32 into sentences.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.files import atomic_write, writing_failed

MANIFEST = "manifest.json"
VERSION = 1
_MAGIC = b"fastbert"
_ALIGNMENT = 64
_HEADER_BYTES = 1024
_BLOCK_BYTES = 1 << 22


@dataclass
class ShardInfo:
    """One shard, as the manifest names it."""

    file: str
    tokens: int
    sentences: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of shards holds.

    Attributes:
        tokenizer: fingerprint of the vocabulary.
        vocab_size: of it.
        sources: path, bytes and modification time of every file that was read.
        doc_sep: how documents were separated.
        shards: in order.
        skipped: what gave no tokens, by reason.
        cursor: the file, and the documents of it, that are in finished shards.
        complete: whether the last shard is written.
    """

    tokenizer: str
    vocab_size: int
    sources: list[dict[str, Any]]
    doc_sep: str
    version: int = VERSION
    shards: list[ShardInfo] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    cursor: tuple[int, int] = (0, 0)
    complete: bool = False

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def checksum(self) -> str:
        """Of all tokens and the vocabulary: another text, another checksum."""
        parts = [self.tokenizer, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            InputError: none there, or unreadable.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["version"] != VERSION:
                raise InputError(
                    f"{path}: version {raw['version']} of the format, this program reads {VERSION}"
                )
            shards = [ShardInfo(**shard) for shard in raw.pop("shards")]
            return cls(**{**raw, "shards": shards, "cursor": tuple(raw["cursor"])})
        except FileNotFoundError:
            raise InputError(f"{folder}: no shards here ({MANIFEST} is missing)") from None
        except InputError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: unreadable: {error}") from None

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        with atomic_write(folder / MANIFEST) as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")


class ShardWriter:
    """Writes one shard: ids go to disk as they come, starts are kept until the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], tokenizer: str, vocab_size: int) -> None:
        self.path, self.dtype = path, dtype
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.tokens = 0
        self._lengths: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.tmp")
        try:
            self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115
            self._file.write(b"\0" * _HEADER_BYTES)
        except OSError as error:
            raise writing_failed(path, error) from error

    def add(self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> None:
        """Append whole documents: their ids, tokens a sentence, sentences a document."""
        self._write(ids.astype(self.dtype, copy=False))
        self.tokens += len(ids)
        self._lengths.append(lengths)
        self._sizes.append(sizes)

    def close(self) -> ShardInfo:
        """Finish the file; it takes its name only now.

        Raises:
            InputError: it could not be written.
        """
        sentence_starts, document_starts = _starts(self._lengths), _starts(self._sizes)
        for starts in (sentence_starts, document_starts):
            self._pad()
            self._write(starts)
        info = ShardInfo(
            self.path.name,
            self.tokens,
            len(sentence_starts) - 1,
            len(document_starts) - 1,
            self._hash.hexdigest(),
        )
        header = {
            "version": VERSION,
            "dtype": self.dtype.name,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            **asdict(info),
        }
        text = json.dumps(header).encode()
        try:
            self._file.seek(0)
            self._file.write(_MAGIC + struct.pack("<Q", len(text)) + text)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise writing_failed(self.path, error) from error
        return info

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _pad(self) -> None:
        here = self._file.tell()
        self._file.write(b"\0" * (_aligned(here) - here))

    def _write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data
        self._hash.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise writing_failed(self.path, error) from error


def open_shard(path: Path, info: ShardInfo, tokenizer: str) -> TokenizedCorpus:
    """Map a shard; its arrays stay on disk until they are looked at.

    Raises:
        InputError: missing, cut, of another vocabulary, or not the one the manifest names.
    """
    header = _read_header(path)
    try:
        found = ShardInfo(**{name: header[name] for name in asdict(info)})
        if header["tokenizer"] != tokenizer:
            raise InputError(f"{path}: written with another vocabulary than its manifest says")
        if found != info:
            raise InputError(f"{path}: not the shard that {MANIFEST} names; prepare the text anew")
        dtype = np.dtype(header["dtype"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged header: {error}") from None
    arrays, offset = [], _HEADER_BYTES
    shapes = ((dtype, found.tokens), (_U32, found.sentences + 1), (_U32, found.documents + 1))
    size = path.stat().st_size
    for kind, count in shapes:
        offset = _aligned(offset)
        end = offset + kind.itemsize * count
        if end > size:
            raise InputError(f"{path}: cut off: {size:,} bytes, at least {end:,} are wanted")
        arrays.append(np.memmap(path, kind, "r", offset, (count,)))
        offset = end
    ids, sentence_starts, document_starts = arrays
    return TokenizedCorpus(ids, sentence_starts, document_starts)


def verify_shard(path: Path, info: ShardInfo) -> None:
    """Compare a shard's bytes with its checksum.

    Raises:
        InputError: they differ, or cannot be read.
    """
    corpus = open_shard(path, info, _read_header(path)["tokenizer"])
    digest = hashlib.sha256()
    for array in (corpus.ids, corpus.sentence_starts, corpus.document_starts):
        step = max(_BLOCK_BYTES // array.itemsize, 1)
        for start in range(0, len(array), step):
            digest.update(np.ascontiguousarray(array[start : start + step]).data)
    if digest.hexdigest() != info.sha256:
        raise InputError(f"{path}: damaged: its bytes do not fit its checksum; prepare it anew")


def open_folder(
    folder: str | os.PathLike[str],
    tokenizer: str,
    *,
    verify: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[Manifest, list[TokenizedCorpus]]:
    """Map all shards of a folder.

    Args:
        folder: written by `prepare`.
        tokenizer: fingerprint that the shards must have.
        verify: read every byte and compare checksums.
        say: told when much is to be read.

    Raises:
        InputError: unfinished, missing or damaged shards, or another vocabulary.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if not manifest.complete:
        raise InputError(f"{folder}: not finished; the same `fastbert prepare` goes on with it")
    if manifest.tokenizer != tokenizer:
        raise InputError(
            f"{folder}: prepared with another vocabulary than --tokenizer names "
            f"(of {manifest.vocab_size:,} ids); prepare the text with this one"
        )
    if verify and manifest.tokens > 1 << 30:
        say(f"{folder}: verifying {manifest.tokens:,} tokens")
    corpora = []
    for info in manifest.shards:
        if verify:
            verify_shard(folder / info.file, info)
        corpora.append(open_shard(folder / info.file, info, tokenizer))
    return manifest, corpora


def is_folder_of_shards(path: str | os.PathLike[str]) -> bool:
    """Whether `prepare` wrote this folder."""
    return (Path(path) / MANIFEST).is_file()


_U32: np.dtype[Any] = np.dtype(np.uint32)


def _starts(counts: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.zeros(0, np.int64), *counts])
    return np.concatenate([[0], np.cumsum(joined)]).astype(_U32)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: the shard is missing; `fastbert prepare` writes it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    try:
        if raw[: len(_MAGIC)] != _MAGIC:
            raise ValueError("no shard of fastbert")
        (length,) = struct.unpack_from("<Q", raw, len(_MAGIC))
        start = len(_MAGIC) + 8
        header: dict[str, Any] = json.loads(raw[start : start + length])
        return header
    except (ValueError, struct.error) as error:
        raise InputError(f"{path}: damaged header: {error}") from None
