"""Text to token shards, on all cores, restartable: what `fastbert prepare` does.

1. Files are read in order into blocks of whole documents.
2. Worker processes cut a block into sentences and these into ids.
3. Blocks are appended, in order, to the open shard; a full shard gets its name and its place in
   the manifest at once. What a kill leaves unfinished is that one shard.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastbert.data.corpus import Reader
from fastbert.data.sentences import split_sentences
from fastbert.data.shards import MANIFEST, Manifest, ShardWriter
from fastbert.data.text_files import counted, find_files
from fastbert.data.workers import worker_pool
from fastbert.errors import InputError
from fastbert.files import is_leftover, locked, writing_failed
from fastbert.tokenizer import Tokenizer

# some 64 MB of ids, so that a kill costs minutes at most
SHARD_TOKENS = 1 << 25
BLOCK_CHARACTERS = 1_000_000
BLOCKS_IN_FLIGHT = 3
BYTES_A_PROCESS = 2_000_000
LINE_SECONDS = 15.0
_HASH_BYTES = 1 << 22

SKIPPED = ("documents without text", "documents without tokens", "sentences without tokens")


@dataclass
class Block:
    """Documents on their way to a worker.

    Attributes:
        texts: whole documents.
        cursor: file, and documents of it read once this block is.
        empty: documents without text up to here.
        last: nothing follows.
    """

    texts: list[str]
    cursor: tuple[int, int]
    empty: int
    last: bool = False


@dataclass
class Encoded:
    """A block's ids: of all sentences on end, tokens a sentence, sentences a document."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    dropped_sentences: int
    dropped_documents: int


def prepare(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    doc_sep: str = "auto",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Write the ids of text files into shards; a killed call is taken up where it stopped.

    Args:
        sources: files, globs, folders, or hf:NAME.
        tokenizer: its fingerprint is kept with the shards.
        out: folder of the shards: new, empty, or of an unfinished call with the same arguments.
        doc_sep: how documents are separated.
        workers: processes; None for one a core.
        shard_tokens: after which a shard is closed.
        say: told guesses, what was skipped, and the totals.

    Raises:
        InputError: bad text, a folder that holds something else, no space left.
    """
    if shard_tokens < 1:
        raise InputError(f"--shard-tokens must be at least 1, got {shard_tokens}")
    if workers is not None and workers < 1:
        raise InputError(f"--workers must be at least 1, got {workers}")
    reader = Reader(find_files(sources, say=say), doc_sep, say)
    folder = Path(out)
    _refuse_foreign(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(folder, error) from error
    with locked(folder):
        manifest = _open_manifest(folder, reader, tokenizer, doc_sep)
        if manifest.complete:
            say(f"{folder}: finished already: {describe(manifest)}")
            return manifest
        if manifest.shards:
            say(f"{folder}: going on after {len(manifest.shards)} finished shards")
        manifest.save(folder)
        processes = workers if workers is not None else _worth(manifest)
        began = time.monotonic()
        before = manifest.tokens
        with Encoder(tokenizer, processes) as encoder:
            _write_shards(folder, manifest, reader, encoder, shard_tokens)
        if not manifest.tokens:
            raise InputError(f"{sources[0]}: no token in all of the text")
        manifest.complete = True
        manifest.save(folder)
        rate = (manifest.tokens - before) / max(time.monotonic() - began, 1e-9)
        say(f"{folder}: {describe(manifest)}; {rate:,.0f} tokens/s on {processes} processes")
    return manifest


class Encoder:
    """Turns blocks into ids: in worker processes, or in this one where one is wanted."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self.processes = processes
        self._backend = tokenizer.backend.to_str()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        if self.processes > 1:
            self._pool = worker_pool(self.processes, _load_backend, self._backend)
        else:
            _load_backend(self._backend)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Blocks and their ids, in order; only a few are read ahead.

        Raises:
            InputError: a worker was killed.
        """
        if self._pool is None:
            yield from ((block, encode_block(block.texts)) for block in blocks)
            return
        waiting: deque[tuple[Block, Future[Encoded]]] = deque()
        try:
            for block in blocks:
                waiting.append((block, self._pool.submit(encode_block, block.texts)))
                # the texts are with the worker now
                block.texts = []
                if len(waiting) >= BLOCKS_IN_FLIGHT * self.processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise InputError(
                "prepare: a worker process was killed, for want of memory perhaps (fewer "
                "--workers need less); finished shards are kept, the same command goes on"
            ) from None


def encode_block(texts: Sequence[str]) -> Encoded:
    """Ids of documents; sentences and documents that give no token are left out."""
    sentences: list[str] = []
    counts = []
    for text in texts:
        found = split_sentences(text)
        sentences += found
        counts.append(len(found))
    encodings = _backend.encode_batch_fast(sentences, add_special_tokens=False)
    lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
    ids = np.fromiter(
        itertools.chain.from_iterable(e.ids for e in encodings), np.uint32, int(lengths.sum())
    )
    owners = np.repeat(np.arange(len(counts)), counts)
    sizes = np.bincount(owners[lengths > 0], minlength=len(counts))
    if _backend.get_vocab_size() <= 1 << 16:
        ids = ids.astype(np.uint16)
    return Encoded(
        ids,
        lengths[lengths > 0],
        sizes[sizes > 0],
        dropped_sentences=int((lengths == 0).sum()),
        dropped_documents=int((sizes == 0).sum()),
    )


_backend: Any = None


def _load_backend(serialised: str) -> None:
    global _backend
    from tokenizers import Tokenizer as Backend

    _backend = Backend.from_str(serialised)
    # "[MASK]" in a corpus is text
    _backend.encode_special_tokens = True


def _write_shards(
    folder: Path, manifest: Manifest, reader: Reader, encoder: Encoder, shard_tokens: int
) -> None:
    dtype = np.dtype(np.uint16 if manifest.vocab_size <= 1 << 16 else np.uint32)
    skipped = dict(manifest.skipped)
    writer: ShardWriter | None = None
    with _Progress(manifest, len(reader.files)) as progress, ExitStack() as unfinished:
        for block, encoded in encoder.map(_blocks(reader, manifest)):
            if writer is None:
                path = folder / f"shard-{len(manifest.shards):05d}.bin"
                writer = ShardWriter(path, dtype, manifest.tokenizer, manifest.vocab_size)
                unfinished.callback(writer.discard)
            writer.add(encoded.ids, encoded.lengths, encoded.sizes)
            skipped["documents without text"] = block.empty
            skipped["documents without tokens"] += encoded.dropped_documents
            skipped["sentences without tokens"] += encoded.dropped_sentences
            progress.add(block, encoded)
            if writer.tokens and (block.last or writer.tokens >= shard_tokens):
                manifest.shards.append(writer.close())
                unfinished.pop_all()
                writer = None
                manifest.cursor, manifest.skipped = block.cursor, dict(skipped)
                manifest.save(folder)
    manifest.skipped = skipped


def _blocks(reader: Reader, manifest: Manifest) -> Iterator[Block]:
    """What is left of the text, from the manifest's cursor on; the last block may be empty."""
    first, taken = manifest.cursor
    empty = manifest.skipped["documents without text"]
    texts: list[str] = []
    characters = 0
    for number in range(first, len(reader.files)):
        documents = reader.read(reader.files[number])
        count = 0
        if number == first and taken:
            count = sum(1 for _ in itertools.islice(documents, taken))
            empty -= reader.empty
        for document in documents:
            texts.append(document.text)
            characters += len(document.text)
            count += 1
            if characters >= BLOCK_CHARACTERS:
                yield Block(texts, (number, count), empty + reader.empty)
                texts, characters = [], 0
    yield Block(texts, (len(reader.files), 0), empty + reader.empty, last=True)


class _Progress:
    """A bar on a terminal, a line now and then in a log."""

    def __init__(self, manifest: Manifest, files: int) -> None:
        self.files = files
        self.tokens, self.documents = manifest.tokens, manifest.documents
        self._shown = time.monotonic()
        self._bar = tqdm(
            desc="preparing",
            unit=" documents",
            initial=self.documents,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, block: Block, encoded: Encoded) -> None:
        """Count a block."""
        self.tokens += len(encoded.ids)
        self.documents += len(encoded.sizes)
        here = f"file {min(block.cursor[0] + 1, self.files)} of {self.files}"
        self._bar.update(len(encoded.sizes))
        self._bar.set_postfix_str(f"{self.tokens:,} tokens, {here}")
        if self._bar.disable and time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            line = f"preparing: {self.documents:,} documents, {self.tokens:,} tokens, {here}"
            print(line, file=sys.stderr, flush=True)


def _open_manifest(folder: Path, reader: Reader, tokenizer: Tokenizer, doc_sep: str) -> Manifest:
    """A new manifest, or that of the unfinished call in the folder."""
    fresh = Manifest(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        sources=[describe_source(path) for path in reader.files],
        doc_sep=doc_sep,
        skipped=dict.fromkeys(SKIPPED, 0),
    )
    if not (folder / MANIFEST).exists():
        return fresh
    found = Manifest.load(folder)
    before, now = (
        [(source["bytes"], source["sha256"]) for source in manifest.sources]
        for manifest in (found, fresh)
    )
    for what, same in (
        ("another vocabulary", found.tokenizer == fresh.tokenizer),
        (f"--doc-sep {found.doc_sep}", found.doc_sep == doc_sep),
        ("other text, or text that has changed since", before == now),
    ):
        if not same:
            raise InputError(f"--out {folder}: holds shards of {what}; name a new folder")
    return found


def describe_source(path: Path) -> dict[str, Any]:
    """Name, size and checksum of a file; of what is no file the name alone."""
    described: dict[str, Any] = {"path": str(path), "bytes": None, "sha256": None}
    if path.is_file():
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while data := file.read(_HASH_BYTES):
                    digest.update(data)
        except OSError as error:
            raise InputError(f"{path}: cannot read: {error.strerror}") from error
        described |= {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return described


def describe(manifest: Manifest) -> str:
    """Documents, tokens, shards and what was skipped, in a line."""
    parts = [
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"in {counted(len(manifest.shards), 'shard')}"
    ]
    parts += [f"{count:,} {reason} skipped" for reason, count in manifest.skipped.items() if count]
    return "; ".join(parts)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is no folder; name a new one")
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    if not all(map(is_leftover, folder.iterdir())):
        raise InputError(f"--out {folder}: is not empty; name a new folder")


def _worth(manifest: Manifest) -> int:
    """As many processes as there are cores, fewer for text that is read before they have begun."""
    sizes = [source["bytes"] for source in manifest.sources]
    if None in sizes:
        return _cores()
    return min(_cores(), 1 + sum(sizes) // BYTES_A_PROCESS)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
