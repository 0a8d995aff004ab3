from __future__ import annotations

import dataclasses
import math
import random
from itertools import pairwise

import numpy as np
import pytest
from tiny import random_corpus, tiny_corpus, tiny_tokenizer

from fastbert.data import objectives
from fastbert.data.objectives import Objective, Samples, build_examples, plan_samples
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.packing import IGNORE_INDEX, Examples

OBJECTIVES = [Objective(), Objective("nsp"), Objective("sop")]
NAMES = [str(objective) for objective in OBJECTIVES]


def five_sigma(successes: int, trials: int, share: float) -> bool:
    """Whether so many successes are what `share` gives by chance."""
    return abs(successes - trials * share) <= 5 * math.sqrt(trials * share * (1.0 - share))


def planned(
    corpus: TokenizedCorpus, objective: Objective, max_seq_len: int = 128, seed: int = 0
) -> Samples:
    return plan_samples(corpus, objective, max_seq_len, np.random.default_rng(seed))


def built(
    corpus: TokenizedCorpus,
    objective: Objective,
    *,
    max_seq_len: int = 128,
    probability: float = 0.15,
    seed: int = 0,
) -> tuple[Samples, Examples]:
    samples = planned(corpus, objective, max_seq_len, seed)
    rng = np.random.default_rng(seed + 1)
    return samples, build_examples(corpus, samples, objective, tiny_tokenizer(), probability, rng)


def without_masks(examples: Examples) -> np.ndarray:
    ids = examples.input_ids.copy()
    ids[examples.masked_positions] = examples.labels
    return ids


@pytest.mark.parametrize("text, pair", [("mlm", None), ("mlm+nsp", "nsp"), ("mlm+sop", "sop")])
def test_parse(text, pair):
    assert Objective.parse(text) == Objective(pair)
    assert str(Objective(pair)) == text


@pytest.mark.parametrize(
    "text, objective, classes",
    [
        ("mlm+sop3", Objective("sop", 3), 6),
        ("mlm+sop4", Objective("sop", 4), 24),
        ("mlm+0.5*sop", Objective("sop", pair_weight=0.5), 2),
        ("2*mlm+0.25*nsp", Objective("nsp", 2, 2.0, 0.25), 2),
    ],
)
def test_parse_segments_and_weights(text, objective, classes):
    assert Objective.parse(text) == objective
    assert str(objective) == text and objective.classes == classes


REFUSED = (
    "|nsp|mlm+|mlm+nsp+sop|mlm,sop|MLM|mlm+mlm|mlm+sop5|mlm+nsp3|0*mlm|mlm+-1*sop|mlm*2|"
    "mlm+inf*sop|sop+mlm"
)


@pytest.mark.parametrize("text", REFUSED.split("|"))
def test_parse_refuses(text):
    with pytest.raises(InputError, match="--objective must be mlm, "):
        Objective.parse(text)


def test_saved_beside_a_model(tmp_path):
    assert Objective.load(tmp_path) == (Objective(), None)
    Objective("sop").save(tmp_path, 96)
    assert Objective.load(tmp_path) == (Objective("sop"), 96)
    for broken in ("{", "[]", '{"objective": "clm", "max_seq_len": 3}', '{"objective": 3}'):
        (tmp_path / objectives.OBJECTIVE_FILE).write_text(broken)
        with pytest.raises(InputError, match="unreadable"):
            Objective.load(tmp_path)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
@pytest.mark.parametrize("max_seq_len", [8, 31, 128])
def test_sequences_are_written_out_as_planned(objective, max_seq_len):
    corpus = tiny_corpus()
    tokenizer = tiny_tokenizer()
    samples, examples = built(corpus, objective, max_seq_len=max_seq_len)
    ids = without_masks(examples)
    assert len(examples) == len(samples)
    assert examples.lengths.max() <= max_seq_len
    assert examples.lengths.tolist() == samples.lengths.tolist()
    for number, (start, end) in enumerate(pairwise(examples.cu_seqlens.tolist())):
        first, second = (
            corpus.ids[slice(*ranges[number])].tolist()
            for ranges in (samples.first, samples.second)
        )
        expected = [tokenizer.cls_id, *first, tokenizer.sep_id]
        types = [0] * len(expected)
        if second:
            expected += [*second, tokenizer.sep_id]
            types += [1] * (len(second) + 1)
        assert ids[start:end].tolist() == expected
        assert examples.token_type_ids[start:end].tolist() == types
    if objective.pair is None:
        assert examples.sequence_labels is None
    else:
        assert examples.sequence_labels.tolist() == samples.labels.tolist()


@pytest.mark.parametrize("objective", [Objective(), Objective("sop")], ids=["mlm", "mlm+sop"])
def test_an_epoch_uses_every_token_once(objective):
    corpus = tiny_corpus()
    samples = planned(corpus, objective, 64)
    used = np.zeros(corpus.tokens, dtype=int)
    for ranges in (samples.first, samples.second):
        for start, end in ranges.tolist():
            used[start:end] += 1
    assert (used == 1).all()


def test_no_piece_leaves_its_document():
    corpus = tiny_corpus()
    bounds = corpus.sentence_starts[corpus.document_starts]
    for start, end in planned(corpus, Objective(), 64).first.tolist():
        document = np.searchsorted(bounds, start, side="right") - 1
        assert bounds[document] <= start < end <= bounds[document + 1]


def test_pieces_end_with_sentences_unless_one_is_too_long():
    corpus = random_corpus(200)
    room = 60 - 2
    ends = set(corpus.sentence_starts.tolist())
    for start, end in planned(corpus, Objective(), 60).first.tolist():
        if end in ends:
            continue
        # the sentence that begins at or before the piece runs on past its end
        following = corpus.sentence_starts[np.searchsorted(corpus.sentence_starts, start + 1)]
        assert following > end and end - start <= room


def test_a_tenth_of_the_sequences_may_be_short():
    """In one endless sentence, a sequence is shorter than it could be only by that draw."""
    corpus = TokenizedCorpus(
        ids=np.full(400_000, 9, dtype=np.uint16),
        sentence_starts=np.array([0, 400_000]),
        document_starts=np.array([0, 1]),
    )
    room = 128 - 2
    lengths = planned(corpus, Objective()).lengths[:-1] - 2
    assert lengths.min() >= 2
    # of the lengths 2 to `room`, drawn evenly, one is no shorter
    share = objectives.SHORT_SEQUENCE_SHARE * (room - 2) / (room - 1)
    assert five_sigma(int((lengths < room).sum()), len(lengths), share)
    short = lengths[lengths < room]
    spread = math.sqrt(((room - 2) ** 2 - 1) / 12 / len(short))
    assert abs(short.mean() - (room + 1) / 2) < 5 * spread


def test_masking_rates():
    tokenizer = tiny_tokenizer()
    corpus = random_corpus(600)
    _, examples = built(corpus, Objective("sop"))
    shown = examples.input_ids[examples.masked_positions]
    ordinary = ~np.isin(without_masks(examples), tokenizer.special_ids)
    # rounding at random has less spread than a draw a token; sequences of a token or two have more
    counts = np.add.reduceat(ordinary, examples.cu_seqlens[:-1])
    long = counts >= 1 / 0.15
    masked = examples.num_masked
    assert five_sigma(int(masked[long].sum()), int(counts[long].sum()), 0.15)
    assert (masked >= 1).all()
    assert (np.abs(masked - 0.15 * counts)[long] < 1).all()
    as_mask = shown == tokenizer.mask_id
    words = tokenizer.vocab_size - len(tokenizer.special_ids)
    assert five_sigma(int(as_mask.sum()), len(shown), 0.8)
    # a random token is the right one now and then
    kept = shown == examples.labels
    assert five_sigma(int(kept.sum()), len(shown), 0.1 + 0.1 / words)
    assert five_sigma(int((~kept & ~as_mask).sum()), len(shown), 0.1 * (1 - 1 / words))


def test_random_tokens_are_even_and_never_special():
    tokenizer = tiny_tokenizer()
    corpus = random_corpus(600)
    _, examples = built(corpus, Objective(), probability=0.9)
    shown = examples.input_ids[examples.masked_positions]
    drawn = shown[(shown != examples.labels) & (shown != tokenizer.mask_id)]
    assert not np.isin(drawn, tokenizer.special_ids).any()
    counts = np.bincount(drawn, minlength=tokenizer.vocab_size)[5:]
    words = len(counts)
    # chi-squared: mean words - 1, variance twice that
    chi = float(((counts - len(drawn) / words) ** 2 / (len(drawn) / words)).sum())
    assert abs(chi - (words - 1)) < 5 * math.sqrt(2 * (words - 1))


def test_every_place_in_a_sequence_is_as_likely():
    corpus = random_corpus(600)
    _, examples = built(corpus, Objective())
    starts = np.repeat(examples.cu_seqlens[:-1], examples.num_masked)
    lengths = np.repeat(examples.lengths, examples.num_masked)
    place = (examples.masked_positions - starts - 1 + 0.5) / (lengths - 2)
    assert abs(place.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(place))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_specials_are_never_masked(objective):
    tokenizer = tiny_tokenizer()
    corpus = dataclasses.replace(tiny_corpus(), ids=tiny_corpus().ids.copy())
    # unknown words and spelt-out specials in the text count as special too
    corpus.ids[::7] = tokenizer.unk_id
    corpus.ids[3::7] = tokenizer.mask_id
    _, examples = built(corpus, objective, probability=0.9)
    assert not np.isin(examples.labels, tokenizer.special_ids).any()
    assert np.isin(without_masks(examples), tokenizer.special_ids).sum() > corpus.tokens // 4
    assert (np.diff(examples.masked_positions) > 0).all()


def test_a_sequence_of_specials_alone_has_no_target():
    tokenizer = tiny_tokenizer()
    corpus = TokenizedCorpus(
        ids=np.full(5, tokenizer.unk_id, dtype=np.uint16),
        sentence_starts=np.array([0, 5]),
        document_starts=np.array([0, 1]),
    )
    _, examples = built(corpus, Objective())
    assert len(examples) >= 1 and examples.num_masked.tolist() == [0] * len(examples)


def test_sop_swaps_half_of_the_pairs():
    corpus = random_corpus(600)
    samples = planned(corpus, Objective("sop"))
    paired = samples.labels != IGNORE_INDEX
    swapped = samples.labels == 1
    assert five_sigma(int(swapped.sum()), int(paired.sum()), 0.5)
    in_order = samples.labels == 0
    assert (samples.first[in_order, 1] == samples.second[in_order, 0]).all()
    assert (samples.second[swapped, 1] == samples.first[swapped, 0]).all()


def test_sop_splits_at_a_sentence_end_where_there_is_one():
    corpus = random_corpus(300)
    samples = planned(corpus, Objective("sop"))
    ends = corpus.sentence_starts
    paired = samples.labels != IGNORE_INDEX
    low = np.minimum(samples.first[paired, 0], samples.second[paired, 0])
    high = np.maximum(samples.first[paired, 1], samples.second[paired, 1])
    split = np.maximum(samples.first[paired, 0], samples.second[paired, 0])
    inside = np.searchsorted(ends, high, side="left") - np.searchsorted(ends, low, side="right")
    assert np.isin(split[inside > 0], ends).all()
    assert ((low < split) & (split < high)).all()
    assert (inside > 0).any() and (inside == 0).any()


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_short_pieces_are_one_segment(pair):
    samples = planned(tiny_corpus(), Objective(pair), 64)
    alone = samples.labels == IGNORE_INDEX
    assert alone.any() and (~alone).any()
    assert (samples.second[alone] == 0).all()
    sizes = samples.first[alone, 1] - samples.first[alone, 0]
    assert sizes.max() < objectives.SHORTEST_PAIR and sizes.min() >= 1
    for ranges in (samples.first[~alone], samples.second[~alone]):
        assert (ranges[:, 1] > ranges[:, 0]).all()


def documents_of(corpus: TokenizedCorpus, ranges: np.ndarray) -> np.ndarray:
    bounds = corpus.sentence_starts[corpus.document_starts]
    owner = np.searchsorted(bounds, ranges[:, 0], side="right") - 1
    assert (ranges[:, 1] <= bounds[owner + 1]).all()
    return owner


def test_nsp_takes_the_next_segment_or_another_document_s():
    corpus = random_corpus(600)
    samples = planned(corpus, Objective("nsp"))
    paired = samples.labels != IGNORE_INDEX
    random_next = samples.labels == 1
    assert five_sigma(int(random_next.sum()), int(paired.sum()), 0.5)
    first, second = (documents_of(corpus, r[paired]) for r in (samples.first, samples.second))
    assert ((first == second) == (samples.labels[paired] == 0)).all()
    # truncation may take tokens off both ends of either segment, never reorder them
    in_order = samples.labels == 0
    assert (samples.first[in_order, 1] <= samples.second[in_order, 0]).all()


def test_nsp_of_two_documents_takes_the_other():
    corpus = random_corpus(2, seed=3)
    samples = planned(corpus, Objective("nsp"), 32)
    changed = samples.labels == 1
    assert changed.any()
    first, second = (documents_of(corpus, r[changed]) for r in (samples.first, samples.second))
    assert (first + second == 1).all()


def test_nsp_needs_two_documents():
    with pytest.raises(InputError, match="at least 2 documents, found 1"):
        planned(random_corpus(1), Objective("nsp"))


def published_truncation(size_first: int, size_second: int, room: int) -> tuple[int, int]:
    """One token at a time from the longer segment, the second on a tie."""
    while size_first + size_second > room:
        if size_first > size_second:
            size_first -= 1
        else:
            size_second -= 1
    return size_first, size_second


def test_truncation_leaves_the_published_lengths():
    draw = random.Random(0)
    sizes = [(draw.randint(1, 90), draw.randint(1, 90)) for _ in range(2000)]
    sizes += [(5, 5), (1, 125), (125, 1), (62, 63), (63, 62), (63, 63), (1, 1)]
    for room in (5, 61, 125):
        first = np.array([[1000, 1000 + a] for a, _ in sizes])
        second = np.array([[5000, 5000 + b] for _, b in sizes])
        objectives._truncate_pairs(first, second, room, np.random.default_rng(0))
        ours = list(zip(first[:, 1] - first[:, 0], second[:, 1] - second[:, 0], strict=True))
        assert ours == [published_truncation(a, b, room) for a, b in sizes]
        assert (first[:, 0] >= 1000).all() and (second[:, 0] >= 5000).all()
        assert all(f[1] <= 1000 + a for f, (a, _) in zip(first, sizes, strict=True))
        assert all(s[1] <= 5000 + b for s, (_, b) in zip(second, sizes, strict=True))


def test_truncation_takes_from_front_and_back_alike():
    pairs = 4000
    first = np.tile([0, 80], (pairs, 1))
    second = np.tile([100, 180], (pairs, 1))
    objectives._truncate_pairs(first, second, 100, np.random.default_rng(0))
    from_front = int(first[:, 0].sum() + (second[:, 0] - 100).sum())
    assert five_sigma(from_front, 60 * pairs, 0.5)


@pytest.mark.parametrize("max_seq_len", [8, 17, 64, 128])
def test_pairs_never_exceed_the_room(max_seq_len):
    for pair in ("nsp", "sop"):
        lengths = planned(random_corpus(60), Objective(pair), max_seq_len).lengths
        assert lengths.max() <= max_seq_len


@pytest.mark.parametrize("max_seq_len", [64, 128, 512])
def test_the_two_labels_of_nsp_are_cut_alike(max_seq_len):
    """What no reader would look at tells at most 60 % of the pairs: chance is 50 %."""
    corpus = random_corpus(4000)
    samples = planned(corpus, Objective("nsp"), max_seq_len)
    starts = corpus.sentence_starts
    features = {
        "fills the sequence": samples.lengths == max_seq_len,
        "first starts inside a sentence": ~np.isin(samples.first[:, 0], starts),
        "first ends inside a sentence": ~np.isin(samples.first[:, 1], starts),
        "second starts inside a sentence": ~np.isin(samples.second[:, 0], starts),
        "second ends inside a sentence": ~np.isin(samples.second[:, 1], starts),
        "first is longer": np.diff(samples.first)[:, 0] > np.diff(samples.second)[:, 0],
    }
    for name, feature in features.items():
        of_next, of_random = (feature[samples.labels == label].mean() for label in (0, 1))
        assert (1.0 + abs(of_next - of_random)) / 2 < 0.6, name


def test_nsp_uses_most_of_the_text():
    """Half of the true continuations give way to others, and what overfills a pair is cut."""
    corpus = random_corpus(600)
    samples = planned(corpus, Objective("nsp"))
    used = np.zeros(corpus.tokens, dtype=bool)
    for ranges in (samples.first, samples.second[samples.labels == 0]):
        for start, end in ranges.tolist():
            used[start:end] = True
    assert used.mean() > 0.6


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_the_same_seed_gives_the_same_samples_and_another_does_not(objective):
    corpus = tiny_corpus()
    results = [built(corpus, objective, seed=seed) for seed in (4, 4, 5)]
    (one, first), (same, again), (other, second) = results
    for field in dataclasses.fields(Samples):
        assert np.array_equal(getattr(one, field.name), getattr(same, field.name))
    assert np.array_equal(first.input_ids, again.input_ids)
    assert np.array_equal(first.masked_positions, again.masked_positions)
    assert not np.array_equal(one.first, other.first)
    assert not np.array_equal(first.input_ids, second.input_ids)


def test_the_same_samples_are_masked_anew():
    corpus, tokenizer = tiny_corpus(), tiny_tokenizer()
    samples = planned(corpus, Objective())
    positions = [
        build_examples(
            corpus, samples, Objective(), tokenizer, 0.15, np.random.default_rng(seed)
        ).masked_positions
        for seed in (0, 1)
    ]
    assert not np.array_equal(*positions)


def test_batches_keep_targets_at_their_tokens():
    _, examples = built(tiny_corpus(), Objective("sop"), max_seq_len=64)
    original = without_masks(examples)
    chosen = np.random.default_rng(0).permutation(len(examples))[:9]
    batch = examples.batch(chosen)
    rows = np.concatenate([np.arange(*examples.cu_seqlens[n : n + 2]) for n in chosen])
    assert np.array_equal(original[rows][batch.masked_positions.numpy()], batch.labels.numpy())
    assert batch.num_masked == examples.num_masked[chosen].sum()
