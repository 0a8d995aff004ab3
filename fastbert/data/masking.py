"""Which tokens are to be predicted, and what is shown in their place.

Every draw is a function of the sample's index and of the place in it. Units of whole tokens, words
or spans are taken in random order until a sample's share is reached, in time linear in the tokens
but for one sort of machine words.
"""

from __future__ import annotations

import numpy as np

from fastbert.data.draws import Draws

# of the chosen tokens: 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2018)
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
_COUNT, _KEY, _SHOWN, _WORD = range(100, 104)
_PLACE_BITS, _OWNER_BITS = 22, 16


def choose_tokens(
    index: np.ndarray,
    starts: np.ndarray,
    ordinary: np.ndarray,
    probability: float,
    draws: Draws,
) -> np.ndarray:
    """Places to predict, ascending (Devlin et al. 2018, section 3.1, task 1).

    Of each sequence's ordinary tokens `probability` are chosen, rounded down or up at random so
    that the share is right on average, and at least one.

    Args:
        index: [sequences] int64, global sample indices.
        starts: [sequences + 1] int64 into the stream.
        ordinary: [tokens] bool, what may be chosen.
        probability: share of them.
        draws: of this seed and epoch.
    """
    candidates = np.flatnonzero(ordinary)
    owner = np.repeat(np.arange(len(index)), np.diff(starts))[candidates]
    available = np.bincount(owner, minlength=len(index))
    wanted = wanted_counts(index, available, probability, draws)
    keys = draws.of(_KEY).words(index[owner], candidates - starts[owner])
    chosen = _smallest(keys, owner, candidates, available, wanted)
    return np.sort(chosen)


def wanted_counts(
    index: np.ndarray, available: np.ndarray, probability: float, draws: Draws
) -> np.ndarray:
    """[sequences] int64, how many of the available tokens are to be predicted."""
    wanted = np.floor(available * probability + draws.of(_COUNT).uniform(index)).astype(np.int64)
    return np.minimum(np.maximum(wanted, 1), available)


def hide(
    input_ids: np.ndarray,
    chosen: np.ndarray,
    sample: np.ndarray,
    place: np.ndarray,
    words: np.ndarray,
    mask_id: int,
    draws: Draws,
) -> np.ndarray:
    """Replace the chosen tokens in place, and return what they were.

    Args:
        input_ids: [tokens] int64.
        chosen: [masked] int64, places in it.
        sample: [masked] int64, global sample index of each.
        place: [masked] int64, place of each in its sample.
        words: [words] int64, ids that may stand in for another: none is special.
        mask_id: of [MASK].
        draws: of this seed and epoch.
    """
    labels = input_ids[chosen]
    draw = draws.of(_SHOWN).uniform(sample, place)
    replacement = words[draws.of(_WORD).below(len(words), sample, place)]
    shown = np.where(draw < MASK_SHARE, mask_id, labels)
    input_ids[chosen] = np.where(draw >= 1.0 - RANDOM_SHARE, replacement, shown)
    return labels


def _smallest(
    keys: np.ndarray,
    owner: np.ndarray,
    candidates: np.ndarray,
    available: np.ndarray,
    wanted: np.ndarray,
) -> np.ndarray:
    """Of each owner's candidates the `wanted` with the smallest keys."""
    if len(wanted) < 1 << _OWNER_BITS and len(keys) < 1 << _PLACE_BITS:
        # owner, key and place in one word: a plain sort of integers is many times an argsort's
        # speed, and 26 bits of key leave ties, which the place breaks, rare and harmless
        key_bits = 64 - _OWNER_BITS - _PLACE_BITS
        word = owner.astype(np.uint64) << np.uint64(64 - _OWNER_BITS)
        word |= (keys >> np.uint64(64 - key_bits)) << np.uint64(_PLACE_BITS)
        word |= np.arange(len(keys), dtype=np.uint64)
        word.sort()
        order = (word & np.uint64((1 << _PLACE_BITS) - 1)).astype(np.int64)
    else:
        order = np.lexsort((keys, owner))
    rank = np.arange(len(candidates)) - np.repeat(np.cumsum(available) - available, available)
    return candidates[order[rank < np.repeat(wanted, available)]]
