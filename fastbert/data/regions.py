"""The text of a run as regions: what is shuffled, and cut, as one.

A region is some thousand tokens that follow one another. An epoch visits every region once, in an
order drawn from (seed, epoch); where a region begins depends on neither. So any place of a run is
reached without walking to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastbert.data.draws import Draws
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError

# sequences of full length a region has room for: few regions' ends cut a sequence short, and a
# window still has hundreds of regions from all over the text
SEQUENCES_A_REGION = 32
# a place inside a word moves at most so many tokens
LONGEST_WORD = 32


@dataclass(frozen=True)
class Part:
    """One corpus and which of its tokens are trained on.

    Attributes:
        corpus: in memory or a shard.
        starts, ends: [spans] int64, token ranges in ascending order, each inside one document.
    """

    corpus: TokenizedCorpus
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def whole(cls, corpus: TokenizedCorpus) -> Part:
        """Every document."""
        bounds = document_bounds(corpus)
        return cls(corpus, bounds[:-1], bounds[1:])

    @cached_property
    def offsets(self) -> np.ndarray:
        """[spans + 1] int64, where each span begins when spans lie on end."""
        return np.concatenate([[0], np.cumsum(self.ends - self.starts)])

    @property
    def tokens(self) -> int:
        """That are trained on."""
        return int(self.offsets[-1])

    @cached_property
    def ids(self) -> np.ndarray:
        """The corpus's ids as a plain array: a memmap's own class costs time at every look."""
        return np.asarray(self.corpus.ids)

    def sentence_at(self, index: np.ndarray) -> np.ndarray:
        """Where sentences start, int64."""
        return np.asarray(self.corpus.sentence_starts)[index].astype(np.int64)

    def search_sentences(self, places: np.ndarray, side: str) -> np.ndarray:
        """`searchsorted` in the starts of sentences."""
        starts = np.asarray(self.corpus.sentence_starts)
        # of one dtype, or numpy would convert the whole array
        return np.searchsorted(starts, places.astype(starts.dtype), side)  # type: ignore[call-overload, no-any-return]

    def before_word(
        self, places: np.ndarray, floors: np.ndarray, subword: np.ndarray
    ) -> np.ndarray:
        """Each place, moved back to the start of its word unless that reaches its floor."""
        found = places.copy()
        moving = np.arange(len(places))
        for _ in range(LONGEST_WORD):
            moving = moving[found[moving] < len(self.ids)]
            moving = moving[subword[self.ids[found[moving]]]]
            if not len(moving):
                break
            found[moving] -= 1
        stuck = (found <= floors) | (places - found >= LONGEST_WORD)
        return np.where(stuck, places, found)


class Regions:
    """All regions of a text.

    Args:
        parts: in order.
        room: tokens a sequence has room for, without [CLS] and [SEP]s.
        subword: [vocab_size] bool, which ids continue a word.

    Attributes:
        size: tokens a region, about.
        count: of all parts.

    Raises:
        InputError: no token.
    """

    def __init__(self, parts: Sequence[Part], room: int, subword: np.ndarray) -> None:
        self.parts, self.room, self.subword = list(parts), room, subword
        self.size = SEQUENCES_A_REGION * room
        counts = [-(-part.tokens // self.size) for part in parts]
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.count = int(self.first[-1])
        self.tokens = sum(part.tokens for part in parts)
        if not self.tokens:
            raise InputError("no tokens to train on: the text is empty after tokenising")

    def bounds(self, number: int, regions: np.ndarray) -> np.ndarray:
        """Where regions of part `number` begin and end: [regions, 2] offsets into its spans."""
        part = self.parts[number]
        marks = (regions - self.first[number]) * self.size
        return np.stack([self._snapped(part, marks), self._snapped(part, marks + self.size)], 1)

    def _snapped(self, part: Part, marks: np.ndarray) -> np.ndarray:
        """The start of the next sentence, or of the next word where that is far."""
        marks = np.minimum(marks, part.tokens)
        inside = marks < part.tokens
        at = marks[inside]
        span = np.searchsorted(part.offsets, at, "right") - 1
        place = part.starts[span] + at - part.offsets[span]
        sentence = part.sentence_at(part.search_sentences(place, "left"))
        sentence = np.minimum(sentence, part.ends[span])
        word = part.before_word(place, part.starts[span] - 1, self.subword)
        snapped = np.where(sentence - place <= self.room, sentence, word)
        found = marks.copy()
        found[inside] = part.offsets[span] + snapped - part.starts[span]
        return found


def document_bounds(corpus: TokenizedCorpus) -> np.ndarray:
    """[documents + 1] int64, where documents start in the ids."""
    starts = np.asarray(corpus.sentence_starts)
    return starts[np.asarray(corpus.document_starts).astype(np.int64)].astype(np.int64)


def hold_out(
    corpora: Sequence[TokenizedCorpus], fraction: float, draws: Draws
) -> tuple[list[Part], TokenizedCorpus]:
    """Keep about `fraction` of the documents for scores; only these are copied.

    With fewer than `1 / fraction` documents, books for instance, the end of each is held out.

    Returns:
        The parts to train on, and the held-out text.

    Raises:
        InputError: too little text for both.
    """
    documents = sum(corpus.documents for corpus in corpora)
    if documents * fraction < 1:
        cut = [_without_ends(corpus, fraction) for corpus in corpora]
    else:
        count = min(round(documents * fraction), documents - 1)
        held = np.zeros(documents, dtype=bool)
        held[draws.permutation(documents)[:count]] = True
        cut, first = [], 0
        for corpus in corpora:
            own = held[first : first + corpus.documents]
            bounds = document_bounds(corpus)
            kept = Part(corpus, bounds[:-1][~own], bounds[1:][~own])
            cut.append((kept, np.stack([bounds[:-1][own], bounds[1:][own]], 1)))
            first += corpus.documents
    parts = [kept for kept, _ in cut]
    if not any(len(ranges) for _, ranges in cut) or not any(part.tokens for part in parts):
        raise InputError(
            f"held-out fraction {fraction}: {documents} documents are too few to hold any out"
        )
    pieces = [(part.corpus, ranges) for part, (_, ranges) in zip(parts, cut, strict=True)]
    return parts, _copied(pieces)


def _without_ends(corpus: TokenizedCorpus, fraction: float) -> tuple[Part, np.ndarray]:
    starts = np.asarray(corpus.document_starts).astype(np.int64)
    sizes = np.diff(starts)
    held = np.minimum(np.maximum(np.round(sizes * fraction).astype(np.int64), 1), sizes - 1)
    sentences = np.asarray(corpus.sentence_starts)
    first, middle, end = (
        sentences[places].astype(np.int64)
        for places in (starts[:-1], starts[1:] - held, starts[1:])
    )
    some = end > middle
    return Part(corpus, first, middle), np.stack([middle[some], end[some]], 1)


def _copied(pieces: Sequence[tuple[TokenizedCorpus, np.ndarray]]) -> TokenizedCorpus:
    """The token ranges of several corpora as documents of one, in memory."""
    ids, lengths, sizes = [], [], []
    for corpus, ranges in pieces:
        starts = np.asarray(corpus.sentence_starts)
        for start, end in ranges.tolist():
            ids.append(np.asarray(corpus.ids[start:end]))
            first, last = np.searchsorted(starts, np.array([start, end], dtype=starts.dtype))
            lengths.append(np.diff(starts[first : last + 1].astype(np.int64)))
            sizes.append(last - first)
    return TokenizedCorpus(
        np.concatenate(ids),
        np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
    )
