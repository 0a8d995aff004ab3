from __future__ import annotations

import math

import numpy as np
import pytest

from fastbert.data.draws import Draws
from fastbert.data.masking import STYLES, UNIT_WORDS, choose_tokens, choose_units, hide, word_units

# ids of a small vocabulary: 0 to 4 special, 5 to 49 words, 50 to 79 continuations, 80 to 99 Chinese
SPECIAL, WORDS, VOCABULARY, MASK = 5, 45, 100, 4
IDS = np.arange(VOCABULARY)
IS_SUBWORD = (IDS >= 50) & (IDS < 80)
IS_IDEOGRAPH = IDS >= 80


def five_sigma(successes: float, trials: int, share: float) -> bool:
    return abs(successes - trials * share) <= 5 * math.sqrt(trials * share * (1.0 - share))


class Text:
    """Random sequences: [CLS] words [SEP], now and then an unknown word."""

    def __init__(self, sequences: int = 3000, *, chinese: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(2, 120, sequences)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        kinds = rng.random(self.starts[-1])
        self.ids = np.where(
            kinds < 0.65, rng.integers(5, 50, len(kinds)), rng.integers(50, 80, len(kinds))
        )
        if chinese:
            # runs of characters, with punctuation (a word) in between
            self.ids = np.where(kinds < 0.9, rng.integers(80, 100, len(kinds)), 5)
        self.ids = np.where(rng.random(len(kinds)) < 0.02, 1, self.ids)
        self.ids[self.starts[:-1]], self.ids[self.starts[1:] - 1] = 2, 3
        self.ordinary = self.ids >= SPECIAL
        self.index = rng.permutation(10**6)[:sequences]

    def units(self, style: str, draws: Draws) -> np.ndarray:
        return word_units(
            style, self.ids, self.index, self.starts, self.ordinary, IS_SUBWORD, IS_IDEOGRAPH, draws
        )

    def choose(self, style: str, probability: float = 0.15, seed: int = 0) -> np.ndarray:
        draws = Draws(seed)
        if style == "token":
            return choose_tokens(self.index, self.starts, self.ordinary, probability, draws)
        units = self.units(style, draws)
        return choose_units(self.index, self.starts, self.ordinary, units, probability, draws)

    def expected(self, probability: float) -> tuple[np.ndarray, np.ndarray]:
        """Of each sequence: ordinary tokens, and the targets it should have on average."""
        counts = np.add.reduceat(self.ordinary, self.starts[:-1])
        share = counts * probability
        return counts, np.where((share < 1) & (counts > 0), 1.0, share)


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("probability", [0.15, 0.3])
@pytest.mark.parametrize("style", STYLES)
def test_the_share_is_right_and_no_special_token_is_touched(style, probability, chinese):
    text = Text(chinese=chinese)
    chosen = text.choose(style, probability)
    assert (np.diff(chosen) > 0).all()
    assert text.ordinary[chosen].all()
    owner = np.searchsorted(text.starts, chosen, "right") - 1
    counts, expected = text.expected(probability)
    found = np.bincount(owner, minlength=len(counts))
    # the spread of what was found around what was due, sequence by sequence
    error = found - expected
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(len(error))
    assert (found <= counts).all()


@pytest.mark.parametrize("style", ["whole-word", "ngram", "span"])
def test_words_are_predicted_altogether_or_not_at_all(style):
    text = Text()
    chosen = np.zeros(len(text.ids), dtype=bool)
    chosen[text.choose(style)] = True
    # a continuation is chosen when its word's beginning is
    follows = np.flatnonzero(IS_SUBWORD[text.ids] & text.ordinary)
    follows = follows[text.ordinary[follows - 1]]
    assert len(follows) > 10_000
    assert np.array_equal(chosen[follows], chosen[follows - 1])


def test_tokens_are_chosen_without_regard_to_words():
    text = Text()
    chosen = np.zeros(len(text.ids), dtype=bool)
    chosen[text.choose("token")] = True
    follows = np.flatnonzero(IS_SUBWORD[text.ids] & text.ordinary)
    follows = follows[text.ordinary[follows - 1]]
    both = (chosen[follows] & chosen[follows - 1]).sum() / chosen[follows].sum()
    assert both < 0.25


def by_definition(text: Text, style: str, draws: Draws) -> list[int]:
    """Unit numbers, token by token."""
    units: list[int] = []
    words_left = 0
    for sequence, sample in enumerate(text.index):
        rank = -1
        unit_of_sequence = -1
        ends = -1
        previous = None
        for place in range(text.starts[sequence], text.starts[sequence + 1]):
            if not text.ordinary[place]:
                previous = None
                continue
            token = text.ids[place]
            begins = previous is None or not IS_SUBWORD[token]
            if previous is not None and IS_IDEOGRAPH[token] and IS_IDEOGRAPH[previous]:
                at = np.array([place - text.starts[sequence]])
                begins = draws.of(104).uniform(np.array([sample]), at)[0] < 0.5
            if begins:
                rank += 1
                new = style == "whole-word" or previous is None
                if style != "whole-word" and rank > ends:
                    unit_of_sequence += 1
                    draw = draws.of(105).uniform(np.array([sample]), unit_of_sequence)[0]
                    size = 1 + int((np.cumsum(UNIT_WORDS[style])[:-1] <= draw).sum())
                    ends += size
                    new = True
                if new:
                    words_left += 1
            units.append(words_left - 1)
            previous = token
    return units


@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("style", ["whole-word", "ngram", "span"])
def test_units_are_those_of_the_definition(style, chinese):
    text = Text(60, chinese=chinese)
    draws = Draws(3)
    assert text.units(style, draws).tolist() == by_definition(text, style, draws)


@pytest.mark.parametrize("style", ["ngram", "span"])
def test_units_have_the_published_lengths(style):
    # words of one token and no unknown one, so that tokens count words
    text = Text(800)
    inner = np.ones(len(text.ids), dtype=bool)
    inner[text.starts[:-1]] = inner[text.starts[1:] - 1] = False
    text.ids[inner] = 7
    text.ordinary = inner
    sizes = np.bincount(text.units(style, Draws(1)))
    ends = np.cumsum(np.add.reduceat(inner, text.starts[:-1])[np.diff(text.starts) > 2])
    # the last unit of a sequence is cut by its end
    whole = ~np.isin(np.cumsum(sizes), ends)
    # long units are cut more often: compare the lengths of those far from an end
    far = np.isin(np.arange(len(sizes)), np.flatnonzero(whole)[:])
    place = np.cumsum(sizes) - sizes
    distance = ends[np.searchsorted(ends, place, "right")] - place
    far &= distance > 20
    counts = np.bincount(sizes[far], minlength=len(UNIT_WORDS[style]) + 1)[1:]
    for share, count in zip(UNIT_WORDS[style], counts, strict=True):
        assert five_sigma(int(count), int(far.sum()), float(share))


def test_chinese_words_have_two_characters_on_average():
    text = Text(2000, chinese=True)
    units = text.units("whole-word", Draws(1))
    ideograph = IS_IDEOGRAPH[text.ids[text.ordinary]]
    characters = np.flatnonzero(text.ordinary)
    inside = (np.diff(characters) == 1) & ideograph[1:] & ideograph[:-1]
    assert five_sigma(int((np.diff(units) == 1)[inside].sum()), int(inside.sum()), 0.5)


@pytest.mark.parametrize("style", STYLES)
def test_eighty_ten_ten(style):
    text = Text()
    chosen = text.choose(style, 0.3)
    owner = np.searchsorted(text.starts, chosen, "right") - 1
    words = np.flatnonzero(IDS >= SPECIAL)
    together = None
    if style == "span":
        units = text.units(style, Draws(0))
        first = np.flatnonzero(text.ordinary)[np.flatnonzero(np.diff(units, prepend=-1))]
        of_token = np.zeros(len(text.ids), dtype=np.int64)
        of_token[text.ordinary] = first[units]
        together = (of_token - text.starts[np.searchsorted(text.starts, of_token, "right") - 1])[
            chosen
        ]
    shown = text.ids.copy()
    labels = hide(
        shown,
        chosen,
        text.index[owner],
        chosen - text.starts[owner],
        words,
        MASK,
        Draws(0),
        together,
    )
    assert np.array_equal(labels, text.ids[chosen])
    untouched = np.ones(len(shown), dtype=bool)
    untouched[chosen] = False
    assert np.array_equal(shown[untouched], text.ids[untouched])
    now = shown[chosen]
    # where tokens share their fate, fewer draws decide as many tokens
    draws = (
        len(chosen) if together is None else len(np.unique(np.stack([owner, together]), axis=1).T)
    )
    crowd = len(chosen) / draws * 2 if together is not None else 1
    share = int((now == MASK).sum() / crowd), int(len(chosen) / crowd)
    assert five_sigma(*share, 0.8)
    kept = int(((now == labels) & (now != MASK)).sum() / crowd), share[1]
    assert five_sigma(*kept, 0.1 + 0.1 / len(words))
    assert not ((now < SPECIAL) & (now != MASK)).any()
    if together is not None:
        same = (np.diff(owner) == 0) & (np.diff(together) == 0)
        assert np.array_equal((now == MASK)[1:][same], (now == MASK)[:-1][same])


def test_every_place_in_a_sequence_is_as_likely():
    text = Text()
    for style in STYLES:
        chosen = text.choose(style)
        owner = np.searchsorted(text.starts, chosen, "right") - 1
        size = np.diff(text.starts)[owner]
        place = (chosen - text.starts[owner] - 0.5) / (size - 2)
        # tokens of a unit go together
        assert abs(place.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(place)) * 4


def test_nothing_ordinary_at_all():
    text = Text(5)
    text.ordinary[:] = False
    for style in STYLES:
        assert len(text.choose(style)) == 0
