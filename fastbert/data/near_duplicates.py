"""Near-duplicate texts: word shingles, minhash bands, and a check of every candidate.

Broder (1997), On the resemblance and containment of documents.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 3
_BANDS = 6
_ROWS_A_BAND = 3
_RESEMBLANCE = 0.6


def duplicate_groups(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first text it is a near-duplicate of (its own when none).

    Two texts are near-duplicates when they share at least 60 % of their three-word shingles; case
    and punctuation do not count. The time grows with the total length. Reproducible.
    """
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))
    first_seen: dict[tuple[int, bytes], int] = {}
    for index, own in enumerate(shingles):
        for band, key in enumerate(_band_keys(own)):
            other = first_seen.setdefault((band, key), index)
            if other == index or _root(parent, other) == _root(parent, index):
                continue
            if _resemblance(shingles[other], own) >= _RESEMBLANCE:
                low, high = sorted((_root(parent, other), _root(parent, index)))
                parent[high] = low
    return [_root(parent, index) for index in range(len(texts))]


def _shingles(text: str) -> np.ndarray:
    """Distinct 64-bit hashes of the text's three-word shingles, sorted."""
    words = _WORD.findall(text.lower())
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    while 0 < len(hashes) < _SHINGLE_WORDS:
        hashes = np.append(hashes, np.uint64(0))
    count = max(len(hashes) - _SHINGLE_WORDS + 1, 0)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(_SHINGLE_WORDS):
        mixed = _mix(mixed + hashes[offset : offset + count])
    return np.unique(mixed)


def _mix(values: np.ndarray) -> np.ndarray:
    # the finaliser of splitmix64; uint64 wraps around
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_SALTS = _mix(np.arange(1, _BANDS * _ROWS_A_BAND + 1, dtype=np.uint64))


def _band_keys(shingles: np.ndarray) -> list[bytes]:
    if not len(shingles):
        return [b""] * _BANDS
    minima = _mix(shingles[:, None] ^ _SALTS).min(axis=0)
    return [row.tobytes() for row in minima.reshape(_BANDS, _ROWS_A_BAND)]


def _resemblance(left: np.ndarray, right: np.ndarray) -> float:
    if not len(left) and not len(right):
        return 1.0
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _root(parent: list[int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
