"""Regions to samples: which tokens a sequence holds, in which segments, and its label.

Cuts, splits and pairs are drawn by the sample's index alone; every token is used about once an
epoch. The rules are those of Devlin et al. (2018) and of Lan et al. (2019, arXiv:1909.11942).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from fastbert.data.draws import Draws
from fastbert.data.objectives import SHORT_SEQUENCE_SHARE, Objective
from fastbert.data.regions import Part, Regions
from fastbert.errors import InputError
from fastbert.packing import IGNORE_INDEX

# a segment of less says nothing of its order
SHORTEST_SEGMENT = 8
_SHORT, _LENGTH, _SPLIT, _ORDER, _PLACE, _FRONT, _OTHER = range(7)


@dataclass
class Samples:
    """Sequences yet to be written out; one row each.

    Attributes:
        index: [samples] int64, the global sample index: names all that is random in it.
        part: [samples] int64, the corpus it is from.
        ranges: [samples, segments, 2] int64, token ranges; empty ones are no segment.
        labels: [samples] int64, class of the pair objective, -100 where there is none.
    """

    index: np.ndarray
    part: np.ndarray
    ranges: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: np.ndarray) -> Samples:
        return Samples(self.index[rows], self.part[rows], self.ranges[rows], self.labels[rows])

    @property
    def lengths(self) -> np.ndarray:
        """[samples] int64, [CLS] and a [SEP] a segment included."""
        sizes = self.ranges[:, :, 1] - self.ranges[:, :, 0]
        return sizes.sum(axis=1) + 1 + (sizes > 0).sum(axis=1)

    @classmethod
    def join(cls, several: list[Samples]) -> Samples:
        """One after another."""
        return cls(
            *(
                np.concatenate([getattr(one, name) for one in several])
                for name in ("index", "part", "ranges", "labels")
            )
        )


def plan_samples(
    regions: Regions, chosen: np.ndarray, objective: Objective, draws: Draws
) -> Samples:
    """Cut regions into samples.

    Args:
        regions: of the whole text.
        chosen: numbers of those that are cut.
        objective: what is drawn for pairs.
        draws: of this seed and epoch.
    """
    owner = np.searchsorted(regions.first, chosen, "right") - 1
    found = []
    for number in np.unique(owner).tolist():
        own = np.sort(chosen[owner == number])
        index, pieces, limits = _cut(regions, number, own, objective, draws)
        ranges, labels = _segments(regions, number, index, pieces, limits, objective, draws)
        found.append(Samples(index, np.full(len(index), number), ranges, labels))
    return Samples.join(found)


def _cut(
    regions: Regions, number: int, own: np.ndarray, objective: Objective, draws: Draws
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, token range and intended length of every piece.

    Whole sentences are gathered while they fit; one longer than the room is cut at a word. For
    next-sentence prediction sentences are gathered until the room is full and pairs cut to it, as
    the published code does: else lengths would give labels away.
    """
    part, room = regions.parts[number], regions.room
    # no piece is empty, so a region has no more pieces than tokens
    slots = 1 << (2 * regions.size).bit_length()
    bounds = regions.bounds(number, own)
    some = bounds[:, 0] < bounds[:, 1]
    own, at, end = own[some], bounds[some, 0], bounds[some, 1]
    span = np.searchsorted(part.offsets, at, "right") - 1
    found: list[tuple[np.ndarray, ...]] = []
    for step in itertools.count():
        if not len(own):
            break
        index = own * slots + step
        short = draws.of(_SHORT).uniform(index) < SHORT_SEQUENCE_SHARE
        limit = np.where(short, 2 + draws.of(_LENGTH).below(room - 1, index), room)
        start = part.starts[span] + at - part.offsets[span]
        stop = np.minimum(part.ends[span], start + end - at)
        cut = start + limit
        following = part.search_sentences(np.minimum(cut, stop), "right")
        last = part.sentence_at(following - 1)
        inside = cut < stop
        to = np.where(last > start, last, cut)
        mid_word = inside & (last <= start)
        if mid_word.any():
            to[mid_word] = part.before_word(cut[mid_word], start[mid_word], regions.subword)
        if objective.pair == "nsp":
            further = part.sentence_at(np.minimum(following, part.corpus.sentences))
            over = (last < cut) & (further - last <= room)
            to = np.where(over, np.minimum(further, stop), to)
        to = np.where(inside, to, stop)
        found.append((index, start, to, limit))
        at = at + (to - start)
        more = at < end
        own, at, end, span = own[more], at[more], end[more], span[more]
        span = span + (at >= part.offsets[span + 1])
        # empty spans, of documents held out whole, are skipped
        while len(span) and (behind := at >= part.offsets[span + 1]).any():
            span = span + behind
    index, start, to, limit = (np.concatenate(column) for column in zip(*found, strict=True))
    return index, np.stack([start, to], 1), limit


def _segments(
    regions: Regions,
    number: int,
    index: np.ndarray,
    pieces: np.ndarray,
    limits: np.ndarray,
    objective: Objective,
    draws: Draws,
) -> tuple[np.ndarray, np.ndarray]:
    """Split pieces as the objective wants: ranges [pieces, segments, 2] and labels [pieces]."""
    labels = np.full(len(pieces), IGNORE_INDEX, dtype=np.int64)
    if objective.pair is None:
        return pieces[:, None, :].copy(), labels
    part, count = regions.parts[number], objective.segments
    splits = _split_points(part, regions.subword, index, pieces, count, draws)
    edges = np.concatenate([pieces[:, :1], splits, pieces[:, 1:]], axis=1)
    ranges = np.stack([edges[:, :-1], edges[:, 1:]], axis=2)
    paired = pieces[:, 1] - pieces[:, 0] >= SHORTEST_SEGMENT * count
    orders = np.array(list(itertools.permutations(range(count))))
    drawn = draws.of(_ORDER).below(len(orders), index)
    if objective.pair == "sop":
        ranges = np.take_along_axis(ranges, orders[drawn][:, :, None], axis=1)
    else:
        _draw_next(regions, number, index, pieces, limits, ranges, paired, drawn == 1, draws)
    ranges[~paired] = 0
    alone = pieces[~paired]
    alone[:, 1] = np.minimum(alone[:, 1], alone[:, 0] + regions.room)
    ranges[~paired, 0] = alone
    labels[paired] = drawn[paired]
    return ranges, labels


def _split_points(
    part: Part,
    subword: np.ndarray,
    index: np.ndarray,
    pieces: np.ndarray,
    count: int,
    draws: Draws,
) -> np.ndarray:
    """[pieces, count - 1] ascending: sentence ends inside each piece, or words where those lack."""
    wanted = count - 1
    low = part.search_sentences(pieces[:, 0], "right")
    inside = np.maximum(part.search_sentences(pieces[:, 1], "left") - low, 0)
    size = pieces[:, 1] - pieces[:, 0]
    at_sentence = inside >= wanted
    # distinct and ascending: drawn with repetition from fewer, then spread by their rank
    choices = np.where(at_sentence, inside, np.maximum(size - 1, 1)) - wanted + 1
    drawn = np.stack(
        [draws.of(_SPLIT).below(np.maximum(choices, 1), index, n) for n in range(wanted)], axis=1
    )
    drawn = np.sort(drawn, axis=1) + np.arange(wanted)
    sentence = np.minimum(low[:, None] + drawn, part.corpus.sentences)
    token = np.minimum(pieces[:, :1] + 1 + drawn, pieces[:, 1:])
    found = np.where(at_sentence[:, None], part.sentence_at(sentence), token)
    floors = pieces[:, 0]
    for column in range(wanted):
        moved = part.before_word(found[:, column], floors, subword)
        found[:, column] = np.where(at_sentence, found[:, column], moved)
        floors = found[:, column]
    return found


def _draw_next(
    regions: Regions,
    number: int,
    index: np.ndarray,
    pieces: np.ndarray,
    limits: np.ndarray,
    ranges: np.ndarray,
    paired: np.ndarray,
    random_next: np.ndarray,
    draws: Draws,
) -> None:
    """Replace half of the second segments, and cut all pairs to the room, in place."""
    changed = paired & random_next
    wanted = np.minimum(limits, pieces[:, 1] - pieces[:, 0]) - (ranges[:, 0, 1] - pieces[:, 0])
    ranges[changed, 1] = _random_segments(
        regions, number, index[changed], ranges[changed, 0], np.maximum(wanted[changed], 1), draws
    )
    _truncate(ranges, index, regions.room, draws)


def _random_segments(
    regions: Regions,
    number: int,
    index: np.ndarray,
    first: np.ndarray,
    wanted: np.ndarray,
    draws: Draws,
) -> np.ndarray:
    """Tokens of other documents of the same part: sentences until there are `wanted` tokens.

    A random place that still has as many tokens after it, so that the segments end with their
    documents about as often as true continuations do. Where `first` ends inside a sentence its
    true continuation starts inside one, and so does the random one.
    """
    part = regions.parts[number]
    documents = len(part.starts)
    if documents < 2:
        raise InputError(
            "next-sentence prediction needs at least 2 documents in every shard, found 1 "
            "(--doc-sep splits the text otherwise, or use --objective mlm+sop)"
        )
    own = np.searchsorted(part.starts, first[:, 0], "right") - 1
    own_size = part.ends[own] - part.starts[own]
    place = draws.of(_PLACE).below(part.tokens - own_size, index)
    place += np.where(place >= part.offsets[own], own_size, 0)
    other = np.searchsorted(part.offsets, place, "right") - 1
    start = part.starts[other] + place - part.offsets[other]
    start = np.maximum(np.minimum(start, part.ends[other] - wanted), part.starts[other])
    sentence = part.sentence_at(part.search_sentences(start, "right") - 1)
    ends_whole = part.sentence_at(part.search_sentences(first[:, 1], "left")) == first[:, 1]
    start = np.where(ends_whole, np.maximum(sentence, part.starts[other]), start)
    full = part.sentence_at(
        np.minimum(part.search_sentences(start + wanted, "left"), part.corpus.sentences)
    )
    end = np.minimum(full, start + regions.room)
    return np.stack([start, np.minimum(end, part.ends[other])], axis=1)


def _truncate(ranges: np.ndarray, index: np.ndarray, room: int, draws: Draws) -> None:
    """Shorten pairs to `room`, in place: one token at a time from the longer segment, from its
    front or back at random (the published code's truncate_seq_pair, in closed form)."""
    sizes = ranges[:, :, 1] - ranges[:, :, 0]
    excess = np.maximum(sizes.sum(axis=1) - room, 0)
    gap = sizes[:, 0] - sizes[:, 1]
    levelled = np.minimum(excess, np.abs(gap))
    rest = excess - levelled
    # on a tie the second segment loses a token first
    cuts = (
        np.where(gap > 0, levelled, 0) + rest // 2,
        np.where(gap < 0, levelled, 0) + (rest + 1) // 2,
    )
    for segment, cut in enumerate(cuts):
        rows = np.flatnonzero(cut)
        front = draws.of(_FRONT + segment).binomial(cut[rows], index[rows])
        ranges[rows, segment, 0] += front
        ranges[rows, segment, 1] -= cut[rows] - front
