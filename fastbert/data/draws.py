"""Random numbers by logical coordinates: each is a function of what it is for, of nothing else.

A 64-bit word is two rounds of splitmix64's finaliser (Steele, Lea, Flood 2014) over a key that
names seed, epoch and purpose, the sample's index, and a counter within the sample. No generator is
kept, so any worker may draw any sample's numbers, in any order.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_WEYL, _STRIDE = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALF_ULP = 2.0**-53


class Draws:
    """The random numbers of one purpose.

    Args:
        coordinates: seed, epoch, purpose: whatever tells this purpose from all others.
    """

    def __init__(self, *coordinates: int) -> None:
        key = 0
        for coordinate in coordinates:
            key = _mix((key ^ (coordinate & _MASK)) & _MASK)
        self.key = key

    def of(self, purpose: int) -> Draws:
        """Other numbers for the same seed and epoch."""
        return Draws(self.key, purpose)

    def words(self, index: np.ndarray, counter: np.ndarray | int = 0) -> np.ndarray:
        """64 random bits for each entry.

        Args:
            index: [n] integers, the sample.
            counter: [n] integers or one, the draw within the sample.

        Returns:
            [n] uint64.
        """
        word = _finalised(np.asarray(index).astype(np.uint64) * np.uint64(_WEYL) + _u64(self.key))
        word += np.atleast_1d(counter).astype(np.uint64) * np.uint64(_STRIDE) + np.uint64(_WEYL)
        return _finalised(word)

    def uniform(self, index: np.ndarray, counter: np.ndarray | int = 0) -> np.ndarray:
        """[n] float64 in [0, 1), as `words`."""
        return (self.words(index, counter) >> np.uint64(11)) * _HALF_ULP

    def below(
        self, limit: np.ndarray | int, index: np.ndarray, counter: np.ndarray | int = 0
    ) -> np.ndarray:
        """[n] int64 in [0, limit), as `words`; the limit far below 2^53."""
        return (self.uniform(index, counter) * limit).astype(np.int64)

    def binomial(self, trials: np.ndarray, index: np.ndarray, counter: int = 0) -> np.ndarray:
        """[n] int64, how many of so many fair coins show heads."""
        words = -(-int(trials.max(initial=0)) // 64)
        if not words:
            return np.zeros(len(trials), dtype=np.int64)
        drawn = self.words(np.repeat(index, words), counter + np.tile(np.arange(words), len(index)))
        coins = np.unpackbits(drawn.view(np.uint8).reshape(len(trials), -1), axis=1)
        heads = coins * (np.arange(64 * words) < trials[:, None])
        return heads.sum(axis=1, dtype=np.int64)

    def permutation(self, count: int) -> np.ndarray:
        """[count] int64, each of 0 to count - 1 once."""
        return np.argsort(self.words(np.arange(count)), kind="stable")


def _finalised(word: np.ndarray) -> np.ndarray:
    word ^= word >> np.uint64(30)
    word *= _FIRST
    word ^= word >> np.uint64(27)
    word *= _SECOND
    word ^= word >> np.uint64(31)
    return word


def _mix(value: int) -> int:
    value = (value + _WEYL) & _MASK
    value = ((value ^ (value >> 30)) * int(_FIRST)) & _MASK
    value = ((value ^ (value >> 27)) * int(_SECOND)) & _MASK
    return value ^ (value >> 31)


def _u64(value: int) -> np.ndarray:
    # an array, whose sums wrap around in silence
    return np.array([value], dtype=np.uint64)
