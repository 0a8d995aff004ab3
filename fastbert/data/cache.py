"""Shards of text that is named outright: prepared once, found again by its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fastbert.data.prepare import describe_source, prepare
from fastbert.data.shards import VERSION, Manifest, is_folder_of_shards
from fastbert.data.text_files import find_files
from fastbert.errors import InputError
from fastbert.tokenizer import Tokenizer


def cache_folder() -> Path:
    """$FASTBERT_CACHE, or fastbert below the user's cache folder."""
    named = os.environ.get("FASTBERT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert"


def shards_of(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    doc_sep: str = "auto",
    say: Callable[[str], None] = print,
) -> Path:
    """The folder of shards that sources stand for: their own, or one in the cache.

    Args:
        sources: one folder of shards, or text, which is prepared unless this was done before.
        tokenizer: of the shards.
        doc_sep: how documents of text are separated.
        say: told where the shards are.

    Raises:
        InputError: bad text, or text that has no content to find it again by.
    """
    shards = [source for source in sources if is_folder_of_shards(source)]
    if shards:
        if len(sources) > 1:
            raise InputError(f"{shards[0]}: a folder of shards stands alone; prepare all in one")
        return Path(shards[0])
    digest = hashlib.sha256(f"{VERSION} {tokenizer.fingerprint} {doc_sep}".encode())
    for path in find_files(sources, say=lambda line: None):
        content = describe_source(path)["sha256"]
        if content is None:
            raise InputError(f"{path}: is no file; fastbert prepare writes it to shards first")
        digest.update(content.encode())
    folder = cache_folder() / "shards" / digest.hexdigest()[:24]
    if is_folder_of_shards(folder) and Manifest.load(folder).complete:
        say(f"text prepared before: {folder}")
    else:
        prepare(sources, tokenizer, folder, doc_sep=doc_sep, say=say)
    return folder
