"""Which tokens are to be predicted, and what is shown in their place.

Every draw is a function of the sample's index and of the place in it. Units of tokens, words,
n-grams or spans are taken in random order until a sample's share is reached, in time linear in the
tokens but for one sort of machine words.
"""

from __future__ import annotations

import numpy as np

from fastbert.data.draws import Draws

STYLES = ("token", "whole-word", "ngram", "span")
# of the chosen tokens: 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2018)
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
# words a unit, with these shares: 1/n up to 3 (Lan et al. 2019, arXiv:1909.11942); geometric with
# p = 0.2, cut at 10 (Joshi et al. 2020, SpanBERT, arXiv:1907.10529)
UNIT_WORDS = {
    "ngram": np.array([6, 3, 2]) / 11,
    "span": 0.8 ** np.arange(10) / (0.8 ** np.arange(10)).sum(),
}
# a gap in a run of Chinese characters ends a word with this probability: words of two characters
# on average, as Chinese has them; there is no dictionary here to find them by
GAP_SHARE = 0.5
_COUNT, _KEY, _SHOWN, _WORD, _GAP, _UNIT, _LAST = range(100, 107)
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
    wanted = _wanted(index, available, probability, draws)
    keys = draws.of(_KEY).words(index[owner], candidates - starts[owner])
    order = _by_key(keys, owner, len(index))
    rank = np.arange(len(candidates)) - np.repeat(np.cumsum(available) - available, available)
    return np.sort(candidates[order[rank < np.repeat(wanted, available)]])


def choose_units(
    index: np.ndarray,
    starts: np.ndarray,
    ordinary: np.ndarray,
    units: np.ndarray,
    probability: float,
    draws: Draws,
) -> np.ndarray:
    """As `choose_tokens`, of whole units: a unit is predicted altogether or not at all.

    The unit that would cross a sequence's share is taken with the probability that makes the share
    right on average, so that a sequence of one long unit may have no target.

    Args:
        units: [ordinary tokens] int64 from `word_units`.
        index, starts, ordinary, probability, draws: as for `choose_tokens`.
    """
    candidates = np.flatnonzero(ordinary)
    if not len(candidates):
        return candidates
    first = np.flatnonzero(np.diff(units, prepend=-1))
    sizes = np.diff(np.append(first, len(candidates)))
    owner = (np.searchsorted(starts, candidates[first], "right") - 1).astype(np.int64)
    available = np.bincount(owner, weights=sizes, minlength=len(index)).astype(np.int64)
    wanted = _wanted(index, available, probability, draws)
    keys = draws.of(_KEY).words(index[owner], candidates[first] - starts[owner])
    order = _by_key(keys, owner, len(index))
    total = np.cumsum(sizes[order])
    before = total - sizes[order]
    # cumulative within each sequence
    per_sequence = np.bincount(owner, minlength=len(index))
    before -= np.repeat(np.cumsum(available) - available, per_sequence)
    room = wanted[owner[order]] - before
    last = draws.of(_LAST).uniform(index)[owner[order]]
    taken = (room >= sizes[order]) | ((room > 0) & (last * sizes[order] < room))
    chosen = np.zeros(len(first), dtype=bool)
    chosen[order[taken]] = True
    return candidates[np.repeat(chosen, sizes)]


def word_units(
    style: str,
    input_ids: np.ndarray,
    index: np.ndarray,
    starts: np.ndarray,
    ordinary: np.ndarray,
    is_subword: np.ndarray,
    is_ideograph: np.ndarray,
    draws: Draws,
) -> np.ndarray:
    """[ordinary tokens] int64, ascending: which unit each ordinary token is in.

    A word is a token and the continuations that follow it; Chinese characters, which the tokenizer
    sets apart, are joined to words of two on average within their run. For "ngram" and "span"
    consecutive words of a sequence are joined.

    Args:
        style: one of STYLES but "token".
        input_ids: [tokens] int64.
        index, starts, ordinary, draws: as for `choose_tokens`.
        is_subword, is_ideograph: [vocab_size] bool.
    """
    candidates = np.flatnonzero(ordinary)
    ids = input_ids[candidates]
    owner = np.searchsorted(starts, candidates, "right") - 1
    adjacent = np.diff(candidates, prepend=-2) == 1
    joined = adjacent & is_subword[ids]
    run = adjacent & is_ideograph[ids]
    run[1:] &= is_ideograph[ids[:-1]]
    if run.any():
        at = np.flatnonzero(run)
        places = candidates[at] - starts[owner[at]]
        joined[at] |= draws.of(_GAP).uniform(index[owner[at]], places) >= GAP_SHARE
    words = np.cumsum(~joined) - 1
    if style == "whole-word":
        return words
    begins = np.flatnonzero(np.diff(words, prepend=-1))
    owner = owner[begins]
    counts = np.bincount(owner, minlength=len(index))
    rank = np.arange(len(begins)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = _unit_sizes(style, draws.of(_UNIT).uniform(index[owner], rank))
    # the units' ends within each sequence; as many draws as words, more than there are units
    ends = np.cumsum(sizes)
    some = counts > 0
    ends -= np.repeat((ends - sizes)[(np.cumsum(counts) - counts)[some]], counts[some])
    opens = rank == 0
    inside = ends < np.repeat(counts, counts)
    opens[(np.arange(len(begins)) - rank + ends)[inside]] = True
    # what is not beside its predecessor, for a special token between, begins anew
    opens |= ~adjacent[begins]
    return (np.cumsum(opens) - 1)[words]


def hide(
    input_ids: np.ndarray,
    chosen: np.ndarray,
    sample: np.ndarray,
    place: np.ndarray,
    words: np.ndarray,
    mask_id: int,
    draws: Draws,
    together: np.ndarray | None = None,
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
        together: [masked] int64; tokens of equal numbers in a sample become [MASK], random or stay
            as one (SpanBERT). None for each on its own.
    """
    labels = input_ids[chosen]
    draw = draws.of(_SHOWN).uniform(sample, place if together is None else together)
    replacement = words[draws.of(_WORD).below(len(words), sample, place)]
    shown = np.where(draw < MASK_SHARE, mask_id, labels)
    input_ids[chosen] = np.where(draw >= 1.0 - RANDOM_SHARE, replacement, shown)
    return labels


def _wanted(
    index: np.ndarray, available: np.ndarray, probability: float, draws: Draws
) -> np.ndarray:
    """[sequences] int64, how many of the available tokens are to be predicted."""
    wanted = np.floor(available * probability + draws.of(_COUNT).uniform(index)).astype(np.int64)
    return np.minimum(np.maximum(wanted, 1), available)


def _unit_sizes(style: str, draw: np.ndarray) -> np.ndarray:
    return 1 + np.searchsorted(np.cumsum(UNIT_WORDS[style])[:-1], draw, "right")


def _by_key(keys: np.ndarray, owner: np.ndarray, owners: int) -> np.ndarray:
    """The order by owner, then key."""
    if owners < 1 << _OWNER_BITS and len(keys) < 1 << _PLACE_BITS:
        # owner, key and place in one word: a plain sort of integers is many times an argsort's
        # speed, and 26 bits of key leave ties, which the place breaks, rare and harmless
        key_bits = 64 - _OWNER_BITS - _PLACE_BITS
        word = owner.astype(np.uint64) << np.uint64(64 - _OWNER_BITS)
        word |= (keys >> np.uint64(64 - key_bits)) << np.uint64(_PLACE_BITS)
        word |= np.arange(len(keys), dtype=np.uint64)
        word.sort()
        return (word & np.uint64((1 << _PLACE_BITS) - 1)).astype(np.int64)
    return np.lexsort((keys, owner))
