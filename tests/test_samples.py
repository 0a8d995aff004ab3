from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from tiny import random_corpus, tiny_corpus

from fastbert.data.draws import Draws
from fastbert.data.objectives import SHORT_SEQUENCE_SHARE, Objective
from fastbert.data.regions import Part, Regions, document_bounds
from fastbert.data.samples import SHORTEST_SEGMENT, Samples, _truncate, plan_samples
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.packing import IGNORE_INDEX

NO_SUBWORDS = np.zeros(1 << 16, dtype=bool)


def five_sigma(successes: int, trials: int, share: float) -> bool:
    return abs(successes - trials * share) <= 5 * math.sqrt(trials * share * (1.0 - share))


def planned(
    *corpora: TokenizedCorpus,
    objective: Objective | None = None,
    length: int = 128,
    seed: int = 0,
    subword: np.ndarray = NO_SUBWORDS,
) -> Samples:
    objective = objective or Objective()
    parts = [Part.whole(corpus) for corpus in corpora]
    regions = Regions(parts, length - objective.added_tokens, subword)
    return plan_samples(regions, np.arange(regions.count), objective, Draws(seed, 0))


def test_indices_are_unique_and_name_the_sample():
    corpora = random_corpus(300), random_corpus(100, seed=3)
    samples = planned(*corpora)
    assert len(np.unique(samples.index)) == len(samples)
    regions = Regions([Part.whole(c) for c in corpora], 126, NO_SUBWORDS)
    some = plan_samples(regions, np.array([regions.count - 1, 2]), Objective(), Draws(0, 0))
    for row, index in enumerate(some.index):
        (place,) = np.flatnonzero(samples.index == index)
        assert np.array_equal(samples.ranges[place], some.ranges[row])


def test_pieces_end_with_sentences_unless_one_is_too_long():
    corpus = random_corpus(400)
    samples = planned(corpus, length=60)
    starts = corpus.sentence_starts
    assert samples.lengths.max() <= 60
    for start, end in samples.ranges[:, 0].tolist():
        if end not in starts:
            # the sentence that begins at or before the piece runs on past its end
            assert starts[np.searchsorted(starts, start + 1)] > end


def test_a_tenth_of_the_sequences_may_be_short():
    """In one endless sentence, a sequence is shorter than it could be only by that draw."""
    corpus = TokenizedCorpus(
        np.full(400_000, 9, dtype=np.uint16), np.array([0, 400_000]), np.array([0, 1])
    )
    regions = Regions([Part.whole(corpus)], 126, NO_SUBWORDS)
    samples = planned(corpus)
    lengths = samples.lengths - 2
    # each region's last piece is what is left
    last = np.append(np.diff(samples.index) > 1, True)
    short = lengths[~last] < 126
    assert five_sigma(int(short.sum()), len(short), SHORT_SEQUENCE_SHARE * 124 / 125)
    assert lengths.min() >= 1 and regions.count > 90
    assert lengths.sum() == 400_000


def test_long_sentences_are_cut_between_words():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 60, 50_000)
    ids[:2] = 5
    subword = np.arange(60) >= 40
    corpus = TokenizedCorpus(ids.astype(np.uint16), np.array([0, 50_000]), np.array([0, 1]))
    for seed in range(2):
        samples = planned(corpus, subword=subword, seed=seed)
        assert not subword[ids[samples.ranges[:, 0, 0]]].any()
    # a word longer than any is cut all the same
    endless = TokenizedCorpus(np.full(5000, 50, np.uint16), np.array([0, 5000]), np.array([0, 1]))
    assert planned(endless, subword=subword).lengths.max() == 128


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_sentence_order_is_even_over_all_permutations(segments):
    corpus = random_corpus(1500)
    samples = planned(corpus, objective=Objective("sop", segments))
    paired = samples.labels != IGNORE_INDEX
    counts = np.bincount(samples.labels[paired])
    orders = list(itertools.permutations(range(segments)))
    assert len(counts) == len(orders)
    for count in counts:
        assert five_sigma(int(count), int(paired.sum()), 1 / len(orders))
    for order, ranges in zip(samples.labels[paired], samples.ranges[paired], strict=True):
        inverse = np.argsort(orders[order])
        in_order = ranges[inverse]
        assert (in_order[1:, 0] == in_order[:-1, 1]).all()
        assert (in_order[:, 1] > in_order[:, 0]).all()
    alone = samples.ranges[~paired]
    assert (np.diff(alone[:, 0]) < SHORTEST_SEGMENT * segments).all() and not alone[:, 1:].any()


def test_splits_are_sentence_ends_where_there_are_some():
    corpus = random_corpus(400)
    for segments in (2, 3):
        samples = planned(corpus, objective=Objective("sop", segments))
        starts = corpus.sentence_starts
        paired = samples.labels != IGNORE_INDEX
        ranges = samples.ranges[paired]
        low, high = ranges[:, :, 0].min(axis=1), ranges[:, :, 1].max(axis=1)
        inside = np.searchsorted(starts, high, "left") - np.searchsorted(starts, low, "right")
        enough = inside >= segments - 1
        assert enough.any() and not enough.all()
        assert np.isin(ranges[enough][:, :, 1], np.append(starts, high)).all()


def test_nsp_takes_the_next_segment_or_another_document_s():
    corpus = random_corpus(900)
    samples = planned(corpus, objective=Objective("nsp"))
    paired = samples.labels != IGNORE_INDEX
    assert five_sigma(int((samples.labels == 1).sum()), int(paired.sum()), 0.5)
    bounds = document_bounds(corpus)
    owners = np.searchsorted(bounds, samples.ranges[paired][:, :, 0], "right") - 1
    assert (samples.ranges[paired][:, :, 1] <= bounds[owners + 1]).all()
    assert ((owners[:, 0] == owners[:, 1]) == (samples.labels[paired] == 0)).all()
    in_order = samples.ranges[samples.labels == 0]
    assert (in_order[:, 0, 1] <= in_order[:, 1, 0]).all()


@pytest.mark.parametrize("length", [64, 128])
def test_the_two_labels_of_nsp_are_cut_alike(length):
    """What no reader would look at tells at most 60 % of the pairs: chance is 50 %."""
    corpus = random_corpus(4000)
    samples = planned(corpus, objective=Objective("nsp"), length=length)
    starts, ranges = corpus.sentence_starts, samples.ranges
    features = {
        "fills the sequence": samples.lengths == length,
        "first starts inside a sentence": ~np.isin(ranges[:, 0, 0], starts),
        "first ends inside a sentence": ~np.isin(ranges[:, 0, 1], starts),
        "second starts inside a sentence": ~np.isin(ranges[:, 1, 0], starts),
        "second ends inside a sentence": ~np.isin(ranges[:, 1, 1], starts),
        "first is longer": np.diff(ranges[:, 0])[:, 0] > np.diff(ranges[:, 1])[:, 0],
    }
    for name, feature in features.items():
        of_next, of_random = (feature[samples.labels == label].mean() for label in (0, 1))
        assert (1.0 + abs(of_next - of_random)) / 2 < 0.6, name


def published_truncation(size_first: int, size_second: int, room: int) -> tuple[int, int]:
    """One token at a time from the longer segment, the second on a tie."""
    while size_first + size_second > room:
        if size_first > size_second:
            size_first -= 1
        else:
            size_second -= 1
    return size_first, size_second


def test_truncation_leaves_the_published_lengths():
    sizes = np.random.default_rng(0).integers(1, 91, (2000, 2))
    for room in (5, 61, 125):
        ranges = np.zeros((2000, 2, 2), dtype=np.int64)
        ranges[:, 1] = 5000
        ranges[:, :, 1] += sizes
        whole = ranges.copy()
        _truncate(ranges, np.arange(2000), room, Draws(0))
        ours = (ranges[:, :, 1] - ranges[:, :, 0]).tolist()
        assert ours == [list(published_truncation(a, b, room)) for a, b in sizes.tolist()]
        assert (ranges[:, :, 0] >= whole[:, :, 0]).all()
        assert (ranges[:, :, 1] <= whole[:, :, 1]).all()
    fronts = int((ranges[:, :, 0] - whole[:, :, 0]).sum())
    backs = int((whole[:, :, 1] - ranges[:, :, 1]).sum())
    assert five_sigma(fronts, fronts + backs, 0.5)


def test_nsp_needs_two_documents_in_a_shard():
    with pytest.raises(InputError, match="at least 2 documents in every shard, found 1"):
        planned(random_corpus(1), objective=Objective("nsp"))


@pytest.mark.parametrize("length", [8, 17, 64])
@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_never_exceed_the_room(pair, length):
    samples = planned(tiny_corpus(), objective=Objective(pair), length=length)
    assert samples.lengths.max() <= length and samples.lengths.min() >= 3
