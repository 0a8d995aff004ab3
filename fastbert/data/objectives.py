"""What pre-training asks of the model: masked tokens, and how two segments relate.

Everything is drawn afresh each epoch, vectorised over a window of sequences.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.packing import IGNORE_INDEX, Examples
from fastbert.tokenizer import Tokenizer

# share of sequences cut shorter than they could be (Devlin et al. 2018, appendix A.2)
SHORT_SEQUENCE_SHARE = 0.1
# of the chosen tokens: 80 % become [MASK], 10 % a random token, 10 % stay
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
# a piece shorter than this is one segment: there is nothing to order
SHORTEST_PAIR = 16
_TERM = re.compile(r"(?:(?P<weight>\d+(?:\.\d+)?)\*)?(?P<name>mlm|nsp|sop[34]?|rtd)")
# of the discriminator's loss (Clark et al. 2020, arXiv:2003.10555, section 3.1)
DETECTION_WEIGHT = 50.0
OBJECTIVE_FILE = "pretraining.json"


@dataclass(frozen=True)
class Objective:
    """Which losses are summed, and with what weights.

    Attributes:
        pair: "nsp" (is the second segment the next one, or random), "sop" (in which order the
            segments are; Lan et al. 2019, arXiv:1909.11942, for two), or None.
        segments: that a sequence with a pair objective is split into.
        detection: replaced-token detection: a generator's masked LM, and a discriminator.
        mlm_weight, pair_weight: of each loss in the sum; the discriminator's is the second.
    """

    pair: str | None = None
    segments: int = 2
    mlm_weight: float = 1.0
    pair_weight: float = 1.0
    detection: bool = False

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read "mlm", "mlm+nsp", "mlm+sop", "mlm+sop3" or "mlm+sop4", each with "0.5*" before it,
        or "rtd", whose weight is the discriminator's.

        Raises:
            InputError: anything else.
        """
        refused = InputError(
            "--objective must be mlm, mlm+nsp, mlm+sop, mlm+sop3, mlm+sop4 or rtd, with weights "
            f"such as mlm+0.5*sop, got {text!r}"
        )
        terms = [_TERM.fullmatch(term) for term in text.split("+")]
        if not 1 <= len(terms) <= 2 or any(term is None for term in terms):
            raise refused
        names = [term["name"] for term in terms if term]
        weights = [float(term["weight"] or 1.0) for term in terms if term]
        if names == ["rtd"] and terms[0]:
            weight = weights[0] if terms[0]["weight"] else DETECTION_WEIGHT
            if not weight > 0:
                raise refused
            return cls(pair_weight=weight, detection=True)
        if (
            "rtd" in names
            or names[0] != "mlm"
            or "mlm" in names[1:]
            or not all(weight > 0 for weight in weights)
        ):
            raise refused
        if len(names) == 1:
            return cls(mlm_weight=weights[0])
        kind = names[1][:3]
        segments = int(names[1][3:] or 2)
        return cls(kind, segments, weights[0], weights[1])

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> tuple[Objective, int | None]:
        """The objective a model folder was trained by, and its sequence length, where it says.

        A folder that does not say (another program's) is taken for masked LM alone.
        """
        path = Path(folder) / OBJECTIVE_FILE
        if not path.is_file():
            return cls(), None
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls.parse(raw["objective"]), int(raw["max_seq_len"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: unreadable: {error}") from None

    def save(self, folder: str | os.PathLike[str], max_seq_len: int) -> None:
        """Write beside a model what it was trained by."""
        with atomic_write(Path(folder) / OBJECTIVE_FILE) as file:
            json.dump({"objective": str(self), "max_seq_len": max_seq_len}, file)
            file.write("\n")

    def __str__(self) -> str:
        if self.detection:
            own = self.pair_weight == DETECTION_WEIGHT
            return "rtd" if own else f"{self.pair_weight:g}*rtd"
        terms = [(self.mlm_weight, "mlm")]
        if self.pair is not None:
            segments = str(self.segments) if self.segments > 2 else ""
            terms.append((self.pair_weight, f"{self.pair}{segments}"))
        return "+".join(f"{weight:g}*{n}" if weight != 1.0 else n for weight, n in terms)

    @property
    def classes(self) -> int:
        """How many labels the pair objective has: of sentence order, every permutation."""
        return math.factorial(self.segments) if self.pair == "sop" else 2

    @property
    def added_tokens(self) -> int:
        """[CLS] and [SEP]s a sequence carries."""
        return 2 if self.pair is None else 1 + self.segments


@dataclass
class Samples:
    """Where each sequence's segments lie in the corpus; one row a sample.

    Attributes:
        first, second: [samples, 2] int64, token ranges [start, end); an empty second range means
            a single segment.
        labels: [samples] int64: 0 in order / the next one, 1 swapped / random, -100 no pair.
    """

    first: np.ndarray
    second: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> Samples:
        return Samples(self.first[rows], self.second[rows], self.labels[rows])

    @property
    def lengths(self) -> np.ndarray:
        """[samples] int64: [CLS] first [SEP], and second [SEP] where there is one."""
        second = self.second[:, 1] - self.second[:, 0]
        return self.first[:, 1] - self.first[:, 0] + second + 2 + (second > 0)


def plan_samples(
    corpus: TokenizedCorpus, objective: Objective, max_seq_len: int, rng: np.random.Generator
) -> Samples:
    """Cut every document into sequences; each token of the corpus is used about once.

    Whole sentences are gathered while they fit (a sentence longer than the room is cut). With a
    pair objective a piece is split at a sentence end, or between tokens where it has only one.
    For next-sentence prediction sentences are gathered until the room is full, and pairs cut to
    it, as the published code does: pairs of either label are then cut alike, and neither their
    lengths nor a segment that starts inside a sentence gives the label away.

    Args:
        corpus: tokens with the starts of sentences and documents.
        objective: with or without a pair.
        max_seq_len: tokens a sequence at most, [CLS] and [SEP]s included.
        rng: this epoch's.
    """
    room = max_seq_len - objective.added_tokens
    pieces, limits = _cut_pieces(corpus, room, rng, overfull=objective.pair == "nsp")
    if objective.pair is None:
        empty = np.zeros_like(pieces)
        return Samples(pieces, empty, np.full(len(pieces), IGNORE_INDEX, dtype=np.int64))
    splits = _split_points(corpus, pieces, rng)
    first = np.stack([pieces[:, 0], splits], axis=1)
    second = np.stack([splits, pieces[:, 1]], axis=1)
    paired = pieces[:, 1] - pieces[:, 0] >= SHORTEST_PAIR
    changed = paired & (rng.random(len(pieces)) < 0.5)
    if objective.pair == "sop":
        first[changed], second[changed] = second[changed], first[changed]
    else:
        wanted = np.minimum(limits, pieces[:, 1] - pieces[:, 0]) - (splits - pieces[:, 0])
        second[changed] = _random_segments(
            corpus, first[changed], np.maximum(wanted[changed], 1), room, rng
        )
        _truncate_pairs(first, second, room, rng)
    first[~paired] = pieces[~paired]
    first[:, 1] = np.minimum(first[:, 1], first[:, 0] + room)
    second[~paired] = 0
    labels = np.where(paired, changed.astype(np.int64), IGNORE_INDEX)
    return Samples(first, second, labels)


def build_examples(
    corpus: TokenizedCorpus,
    samples: Samples,
    objective: Objective,
    tokenizer: Tokenizer,
    mask_probability: float,
    rng: np.random.Generator,
) -> Examples:
    """Write out the samples' tokens and mask them."""
    first = samples.first[:, 1] - samples.first[:, 0]
    second = samples.second[:, 1] - samples.second[:, 0]
    lengths = samples.lengths
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = bounds[:-1]
    input_ids = np.full(bounds[-1], tokenizer.sep_id, dtype=np.int64)
    special = np.ones(bounds[-1], dtype=bool)
    input_ids[starts] = tokenizer.cls_id
    for offset, ranges, sizes in ((1, samples.first, first), (2 + first, samples.second, second)):
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        target = np.repeat(starts + offset, sizes) + within
        input_ids[target] = corpus.ids[np.repeat(ranges[:, 0], sizes) + within]
        special[target] = False
    position = np.arange(bounds[-1]) - np.repeat(starts, lengths)
    examples = Examples(
        input_ids=input_ids,
        token_type_ids=(position >= np.repeat(first + 2, lengths)).astype(np.int64),
        cu_seqlens=bounds,
        sequence_labels=None if objective.pair is None else samples.labels,
    )
    mask_tokens(examples, special, tokenizer, mask_probability, rng)
    return examples


def mask_tokens(
    examples: Examples,
    special: np.ndarray,
    tokenizer: Tokenizer,
    probability: float,
    rng: np.random.Generator,
) -> None:
    """Choose tokens to predict, in place (Devlin et al. 2018, section 3.1, task 1).

    Of each sequence's tokens, special ones excepted, `probability` are chosen, rounded down or up
    at random so that the share is right on average, and at least one. 80 % of them become [MASK],
    10 % a random token that is not special, 10 % stay.

    Args:
        examples: gets `masked_positions` and `labels`; its `input_ids` change.
        special: [tokens] bool, never chosen.
        tokenizer: for [MASK] and the vocabulary.
        probability: share of tokens chosen.
        rng: this window's.
    """
    lengths = examples.lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    ordinary = ~special
    if len(tokenizer.special_ids) and np.isin(examples.input_ids, tokenizer.special_ids).any():
        ordinary &= ~np.isin(examples.input_ids, tokenizer.special_ids)
    candidates = np.flatnonzero(ordinary)
    owner = sequence[candidates]
    available = np.bincount(owner, minlength=len(lengths))
    wanted = np.floor(available * probability + rng.random(len(lengths))).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), available)
    # the order of random keys within each sequence; the first `wanted` of them are chosen
    order = np.argsort(owner + rng.random(len(candidates)), kind="stable")
    rank = np.arange(len(candidates)) - np.repeat(np.cumsum(available) - available, available)
    chosen = np.sort(candidates[order[rank < np.repeat(wanted, available)]])
    examples.masked_positions = chosen
    examples.labels = examples.input_ids[chosen].copy()
    draw = rng.random(len(chosen))
    words = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
    replacement = words[rng.integers(0, len(words), len(chosen))]
    shown = np.where(draw < MASK_SHARE, tokenizer.mask_id, examples.labels)
    shown = np.where(draw >= 1.0 - RANDOM_SHARE, replacement, shown)
    examples.input_ids[chosen] = shown


def _cut_pieces(
    corpus: TokenizedCorpus, room: int, rng: np.random.Generator, *, overfull: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ranges [pieces, 2], and the length that each was to have, [pieces].

    A piece ends with the last sentence that fits; where `overfull`, with the first that does not.
    """
    ends = corpus.sentence_starts[1:].tolist()
    bounds = corpus.sentence_starts[corpus.document_starts].tolist()
    pieces: list[tuple[int, int]] = []
    limits: list[int] = []
    # scalar draws: numpy's cost microseconds each
    draw = random.Random(int(rng.integers(1 << 62)))
    for start, document_end in pairwise(bounds):
        while start < document_end:
            limit = draw.randint(2, room) if draw.random() < SHORT_SEQUENCE_SHARE else room
            cut = start + limit
            if cut >= document_end:
                end = document_end
            else:
                following = bisect_right(ends, cut)
                last = ends[following - 1] if following else 0
                # a sentence longer than the room is cut where the room ends
                end = last if last > start else cut
                if overfull and last < cut and ends[following] - last <= room:
                    end = ends[following]
            pieces.append((start, end))
            limits.append(limit)
            start = end
    return np.array(pieces, dtype=np.int64).reshape(-1, 2), np.array(limits, dtype=np.int64)


def _split_points(
    corpus: TokenizedCorpus, pieces: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A random sentence end inside each piece, or a random token where there is none."""
    ends = corpus.sentence_starts[1:]
    low = np.searchsorted(ends, pieces[:, 0], side="right")
    high = np.searchsorted(ends, pieces[:, 1], side="left")
    inside = np.maximum(high - low, 0)
    draw = rng.random(len(pieces))
    at_sentence = ends[np.minimum(low + (draw * inside).astype(np.int64), len(ends) - 1)]
    size = pieces[:, 1] - pieces[:, 0]
    at_token = pieces[:, 0] + 1 + (draw * np.maximum(size - 1, 1)).astype(np.int64)
    return np.where(inside > 0, at_sentence, np.minimum(at_token, pieces[:, 1]))


def _random_segments(
    corpus: TokenizedCorpus,
    first: np.ndarray,
    wanted: np.ndarray,
    room: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Tokens of other documents than those of `first`: sentences until there are `wanted` tokens.

    A random place in the rest of the corpus that still has as many tokens after it, so that the
    segments end with their documents about as often as true continuations do. Where `first` ends
    inside a sentence its true continuation starts inside one, and so does the random one.
    """
    bounds = corpus.sentence_starts[corpus.document_starts]
    documents = len(bounds) - 1
    if documents < 2:
        raise InputError(
            "next-sentence prediction needs at least 2 documents, found 1 "
            "(--doc-sep splits the text otherwise, or use --objective mlm+sop)"
        )
    starts = corpus.sentence_starts
    own = np.searchsorted(bounds, first[:, 0], side="right") - 1
    own_size = bounds[own + 1] - bounds[own]
    place = (rng.random(len(first)) * (corpus.tokens - own_size)).astype(np.int64)
    place += np.where(place >= bounds[own], own_size, 0)
    other = np.searchsorted(bounds, place, side="right") - 1
    place = np.maximum(np.minimum(place, bounds[other + 1] - wanted), bounds[other])
    sentence = starts[np.searchsorted(starts, place, side="right") - 1]
    start = np.where(np.isin(first[:, 1], starts), sentence, place)
    full = np.searchsorted(starts, start + wanted, side="left")
    end = np.minimum(starts[np.minimum(full, corpus.sentences)], start + room)
    return np.stack([start, np.minimum(end, bounds[other + 1])], axis=1)


def _truncate_pairs(
    first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator
) -> None:
    """Shorten pairs to `room`, in place: one token at a time from the longer segment, from its
    front or back at random (the published code's truncate_seq_pair, in closed form)."""
    size_first, size_second = first[:, 1] - first[:, 0], second[:, 1] - second[:, 0]
    excess = np.maximum(size_first + size_second - room, 0)
    gap = size_first - size_second
    levelled = np.minimum(excess, np.abs(gap))
    rest = excess - levelled
    # on a tie the second segment loses a token first
    cut_first = np.where(gap > 0, levelled, 0) + rest // 2
    cut_second = np.where(gap < 0, levelled, 0) + (rest + 1) // 2
    for ranges, cut in ((first, cut_first), (second, cut_second)):
        front = rng.binomial(cut, 0.5)
        ranges[:, 0] += front
        ranges[:, 1] -= cut - front
