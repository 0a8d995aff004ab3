from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import random_corpus, tiny_corpus, tiny_tokenizer

from fastbert.data import plan
from fastbert.data import writer as module
from fastbert.data.batches import Vocabulary
from fastbert.data.draws import Draws
from fastbert.data.loader import Loader, one_pass
from fastbert.data.objectives import Objective
from fastbert.data.plan import Planner
from fastbert.data.regions import Part, hold_out
from fastbert.data.samples import Samples
from fastbert.data.stream import Position, StreamConfig
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.data.writer import Planned, Writer
from fastbert.errors import InputError
from fastbert.kernels.ops import Layout
from fastbert.packing import IGNORE_INDEX, PackedBatch

CONFIG = StreamConfig(Objective("sop"), token_budget=512, max_seq_len=64, seed=1)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(plan, "WINDOW_BATCHES", 9)


def parts() -> list[Part]:
    return [Part.whole(tiny_corpus(25)), Part.whole(tiny_corpus(20, seed=5))]


def batches(position: Position | None = None, count: int = 8, config=CONFIG, **deal):
    with Loader(parts(), tiny_tokenizer(), config, position, **deal) as loader:
        return list(islice(loader, count))


def planned(samples: Samples, draws: Draws) -> Planned:
    return Planned.alone(samples, draws, CONFIG.mask_probability, CONFIG.max_seq_len, Position())


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in (
            (getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    )


def contents(batch: PackedBatch) -> list[tuple[int, ...]]:
    """Every sequence's unmasked tokens."""
    ids = batch.input_ids.clone()
    real = batch.labels != IGNORE_INDEX
    ids[batch.masked_positions[real]] = batch.labels[real]
    bounds = batch.cu_seqlens.tolist()[: batch.num_sequences + 1]
    return [tuple(ids[start:end].tolist()) for start, end in itertools.pairwise(bounds)]


def test_any_position_resumes_exactly_and_at_once():
    planner = Planner(parts(), tiny_tokenizer(), CONFIG)
    assert planner.windows >= 3
    whole = batches(count=60)
    positions = [Position(), *(after for _, after in whole)]
    epochs = [position.epoch for position in positions]
    # inside a window, at its end, at the end of an epoch, in the next
    turn = epochs.index(1)
    places = {1, 4, turn - 1, turn, turn + 1, turn + 5}
    places |= {i for i, p in enumerate(positions[1:40], 1) if p.window != positions[i - 1].window}
    for place in sorted(places):
        for (expected, _), (actual, _) in zip(
            whole[place : place + 3], batches(positions[place], 3), strict=True
        ):
            assert same(expected, actual)


def test_a_resume_plans_one_window(monkeypatch):
    planned = []
    original = Planner.window

    def window(self, epoch, number):
        planned.append((epoch, number))
        return original(self, epoch, number)

    monkeypatch.setattr(Planner, "window", window)
    planner = Planner(parts(), tiny_tokenizer(), CONFIG)
    next(planner.from_position(Position(epoch=10**6, window=2, batch=1)))
    assert planned == [(10**6, 2)]


@pytest.mark.parametrize("workers", [2])
def test_worker_processes_change_nothing(workers):
    for (expected, at), (actual, place) in zip(batches(), batches(workers=workers), strict=True):
        assert same(expected, actual) and at == place


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_same_groups(ranks):
    """Every optimiser step has the same batches, whoever computes them."""
    group = 4
    alone = batches(count=3 * group, group=group)
    share = -(-group // ranks)
    dealt = [batches(count=3 * share, group=group, rank=r, ranks=ranks) for r in range(ranks)]
    for step in range(3):
        expected = [batch for batch, _ in alone[step * group : (step + 1) * group]]
        found = [batch for own in dealt for batch, _ in own[step * share : (step + 1) * share]]
        real = [batch for batch in found if batch.num_tokens]
        # a rank that is one short gets an empty batch with no target
        assert len(found) == share * ranks and len(real) == group
        assert all(b.num_masked == b.num_labelled == 0 for b in found if not b.num_tokens)
        by_rank = [expected[rank::ranks] for rank in range(ranks)]
        for one, other in zip(real, itertools.chain(*by_rank), strict=True):
            assert same(one, other)
        after = {own[(step + 1) * share - 1][1].batch for own in dealt}
        assert after == {alone[(step + 1) * group - 1][1].batch}


@pytest.mark.parametrize("objective", ["mlm", "mlm+sop"])
def test_an_epoch_uses_every_token_once(objective):
    text = parts()
    config = dataclasses.replace(CONFIG, objective=Objective.parse(objective))
    tokenizer = tiny_tokenizer()
    found = one_pass(text, tokenizer, config)
    used = Counter(
        token
        for batch in found
        for sequence in contents(batch)
        for token in sequence
        if token not in (tokenizer.cls_id, tokenizer.sep_id)
    )
    ids = np.concatenate([part.corpus.ids for part in text])
    assert used == Counter(ids.tolist())
    assert max(len(sequence) for batch in found for sequence in contents(batch)) <= 64


def test_samples_hold_consecutive_tokens_of_one_document():
    planner = Planner(parts(), tiny_tokenizer(), dataclasses.replace(CONFIG, objective=Objective()))
    for number in range(planner.windows):
        samples = planner.window(0, number).samples
        for part, (start, end) in zip(samples.part, samples.ranges[:, 0].tolist(), strict=True):
            corpus = planner.regions.parts[part].corpus
            bounds = corpus.sentence_starts[corpus.document_starts]
            assert start < end
            assert np.searchsorted(bounds, start, "right") == np.searchsorted(bounds, end, "left")


def test_the_masking_rate_follows_the_steps_and_resumes():
    config = dataclasses.replace(
        CONFIG, objective=Objective(), final_mask_probability=0.45, steps=31
    )
    whole = batches(count=60, group=2, config=config)
    rates = [b.num_masked / (b.num_tokens - 2 * b.num_sequences) for b, _ in whole]
    by_step = [(rates[n] + rates[n + 1]) / 2 for n in range(0, 60, 2)]
    # straight from 0.15 to 0.45, each batch within what rounding leaves
    line = np.polyfit(np.arange(30), by_step, 1)
    assert abs(line[0] - 0.01) < 0.002 and abs(line[1] - 0.15) < 0.02
    resumed = batches(whole[19][1], 4, group=2, step=10, config=config)
    for (expected, _), (actual, _) in zip(whole[20:24], resumed, strict=True):
        assert same(expected, actual)


@pytest.mark.parametrize("masking", ["whole-word", "ngram", "span"])
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_masking_styles_go_through(masking, fixed_shapes):
    config = dataclasses.replace(CONFIG, masking=masking, fixed_shapes=fixed_shapes)
    found = one_pass(parts(), tiny_tokenizer(), config)
    tokens = sum(batch.num_tokens for batch in found)
    assert 0.1 < sum(batch.num_masked for batch in found) / tokens < 0.16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"masking": "letters"}, "--masking must be one of token, whole-word, ngram, span"),
        ({"final_mask_probability": 0.1}, "--final-mask-probability needs --max-steps"),
        (
            {"final_mask_probability": 1.0, "steps": 3},
            r"--final-mask-probability must be in \(0, 1\), got 1.0",
        ),
    ],
)
def test_masking_settings_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_epochs_and_seeds_differ():
    first = contents(batches(count=1)[0][0])
    assert contents(batches(count=1)[0][0]) == first
    assert contents(batches(Position(epoch=1), 1)[0][0]) != first
    assert contents(batches(config=dataclasses.replace(CONFIG, seed=2), count=1)[0][0]) != first


def test_masks_differ_from_epoch_to_epoch():
    """The same sample, masked anew: about 15 % of 15 % of the places coincide."""
    planner = Planner(parts(), tiny_tokenizer(), CONFIG)
    write = Writer([p.ids for p in parts()], Vocabulary.of(tiny_tokenizer()), CONFIG)
    samples = planner.window(0, 0).samples
    first, again, other = (
        write(planned(samples, Draws(CONFIG.seed, epoch))).masked_positions for epoch in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    shared = len(np.intersect1d(first, other)) / len(first)
    assert 0.05 < shared < 0.3


def test_a_sample_is_masked_alike_in_any_batch():
    planner = Planner(parts(), tiny_tokenizer(), CONFIG)
    write = Writer([p.ids for p in parts()], Vocabulary.of(tiny_tokenizer()), CONFIG)
    samples, draws = planner.window(0, 0).samples, Draws(CONFIG.seed, 0)
    together = write(planned(samples, draws))
    for row in (0, 3, len(samples) - 1):
        alone = write(planned(samples[np.array([row])], draws))
        bounds = slice(*together.cu_seqlens[row : row + 2])
        assert np.array_equal(together.input_ids[bounds], alone.input_ids)


@pytest.mark.parametrize("masking", ["token", "span"])
def test_what_is_written_together_changes_nothing(masking, monkeypatch):
    """Epochs and masking rates change on the way, and a batch has more targets than room."""
    config = dataclasses.replace(
        CONFIG, masking=masking, fixed_shapes=True, final_mask_probability=0.3, steps=8
    )
    most = 40 if masking == "span" else 10**4
    monkeypatch.setattr(plan, "masked_slots", lambda *_: most)
    found = {}
    for tokens in (1, 4 * config.token_budget):
        monkeypatch.setattr(module, "TOKENS_TOGETHER", tokens)
        found[tokens] = batches(count=40, config=config, group=6, rank=1, ranks=2)
    alone, joined = found.values()
    assert {position.epoch for _, position in alone} >= {0, 1}
    assert masking == "token" or max(batch.num_masked for batch, _ in alone) == most
    for (expected, at), (actual, place) in zip(alone, joined, strict=True):
        assert same(expected, actual) and at == place


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "mlm+sop"])
def test_fixed_shapes_never_vary(objective):
    config = dataclasses.replace(
        CONFIG, objective=Objective.parse(objective), fixed_shapes=True, mask_probability=0.4
    )
    shapes = {
        tuple(
            (f.name, tuple(value.shape))
            for f in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, f.name), torch.Tensor)
        )
        for batch in one_pass(parts(), tiny_tokenizer(), config)
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("budget, length, least", [(16384, 128, 0.995), (4096, 128, 0.98)])
def test_batches_are_full(budget, length, least, monkeypatch):
    monkeypatch.undo()
    config = StreamConfig(Objective("sop"), budget, length)
    planner = Planner([Part.whole(random_corpus(15_000))], tiny_tokenizer(), config)
    tokens = [
        int(window.samples[rows].lengths.sum())
        for window in (planner.window(0, n) for n in range(planner.windows))
        for rows in window.batches
    ]
    assert sum(tokens) >= least * budget * len(tokens)
    # no batch is nearly empty: an optimiser that scales its steps would make a full step of it
    assert min(tokens) > budget / 2


def test_held_out_documents_are_not_trained_on():
    corpora = [tiny_corpus(25), tiny_corpus(20, seed=5)]
    text, heldout = hold_out(corpora, 0.2, Draws(1))
    assert heldout.documents == 9
    assert sum(part.tokens for part in text) + heldout.tokens == sum(c.tokens for c in corpora)
    kept = Counter(
        token
        for part in text
        for start, end in zip(part.starts, part.ends, strict=True)
        for token in part.corpus.ids[start:end].tolist()
    )
    both = kept + Counter(heldout.ids.tolist())
    assert both == Counter(np.concatenate([corpus.ids for corpus in corpora]).tolist())


def test_of_few_long_documents_the_ends_are_held_out():
    corpora = [random_corpus(3)]
    text, heldout = hold_out(corpora, 0.1, Draws(1))
    sizes = np.diff(corpora[0].document_starts)
    expected = np.minimum(np.maximum(np.round(sizes * 0.1), 1), sizes - 1)
    assert np.diff(heldout.document_starts).tolist() == expected[expected > 0].tolist()
    assert text[0].tokens + heldout.tokens == corpora[0].tokens


def test_replay_has_its_share_of_every_window_and_its_own_epochs():
    new, old = [Part.whole(random_corpus(400))], [Part.whole(random_corpus(120, seed=7))]
    config = dataclasses.replace(CONFIG, objective=Objective(), replay_share=0.3)
    planner = Planner(new, tiny_tokenizer(), config, old)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        for number in range(planner.windows):
            samples = planner.window(epoch, number).samples
            replayed = samples.part == 1
            sizes = np.diff(samples.ranges[:, 0])[:, 0]
            # regions are of about equal size: within one of them
            share = sizes[replayed].sum() / sizes.sum()
            slack = planner.regions.size / sizes.sum()
            assert abs(share - 0.3) < 2 * slack
            seen.update(samples.ranges[replayed, 0, 0].tolist())
    regions = planner.regions.count - planner.own
    turns = int(3 * planner.own * planner.replay_rate)
    assert turns > 2 * regions
    chosen = planner._replayed(0, 3 * planner.own)
    counts = np.bincount(chosen - planner.own, minlength=regions)
    # every region before any comes again
    assert counts.max() - counts.min() <= 1
    windows = [planner.window(1, n).samples.index for n in range(planner.windows)]
    fresh = Planner(new, tiny_tokenizer(), config, old)
    assert np.array_equal(fresh.window(1, 2).samples.index, windows[2])


def test_an_error_reaches_the_caller_and_the_thread_ends():
    lonely = [Part.whole(random_corpus(1))]
    with (
        Loader(
            lonely, tiny_tokenizer(), dataclasses.replace(CONFIG, objective=Objective("nsp"))
        ) as loader,
        pytest.raises(InputError, match="at least 2 documents"),
    ):
        next(loader)
    assert not loader._thread.is_alive()


def test_bad_numbers_of_workers():
    with pytest.raises(InputError, match="--loader-workers must be at least 0, got -1"):
        Loader(parts(), tiny_tokenizer(), CONFIG, workers=-1)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_what_a_gpu_reads_is_made_ahead_of_the_step(fixed_shapes, monkeypatch):
    """And nothing on a CPU, where nobody reads it."""
    made: list[str] = []
    original = Layout.prepare

    def prepare(self):
        made.append(threading.current_thread().name)
        original(self)

    monkeypatch.setattr(Layout, "prepare", prepare)
    config = dataclasses.replace(CONFIG, fixed_shapes=fixed_shapes)
    [(batch, _)] = batches(count=1, config=config)
    assert set(made) == ({"batches"} if fixed_shapes else set())
    assert ("layout" in batch.__dict__) == fixed_shapes


@pytest.mark.parametrize("masking", ["token", "whole-word", "span"])
@pytest.mark.parametrize("final", [None, 0.3])
def test_slots_of_targets_are_few_and_nearly_always_enough(masking, final, monkeypatch):
    """A head computes every slot."""
    monkeypatch.undo()
    config = StreamConfig(
        Objective("sop"), 4096, 128, masking=masking, final_mask_probability=final, steps=9
    )
    config = dataclasses.replace(config, fixed_shapes=True)
    parts = [Part.whole(random_corpus(1500))]
    planner = Planner(parts, tiny_tokenizer(), config)
    share = final or 0.15
    assert planner.masked <= (1.15 if masking == "token" else 1.4) * share * 4096
    settings = dataclasses.replace(config, mask_probability=share, final_mask_probability=None)
    for fixed in (True, False):
        settings = dataclasses.replace(settings, fixed_shapes=fixed)
        counts = [batch.num_masked for batch in one_pass(parts, tiny_tokenizer(), settings)]
        assert len(counts) > 40 and max(counts) < planner.masked
        assert sum(counts) > 0.9 * 0.95 * share * 4096 * len(counts)


def test_slots_are_enough_where_every_sequence_has_its_one_target():
    """Of texts of three tokens one is masked, whatever the share."""
    corpus = TokenizedCorpus(
        ids=np.full(900, 9, dtype=np.uint16),
        sentence_starts=np.arange(0, 901, 3),
        document_starts=np.arange(301),
    )
    config = dataclasses.replace(
        CONFIG, objective=Objective(), fixed_shapes=True, mask_probability=0.01
    )
    found = one_pass([Part.whole(corpus)], tiny_tokenizer(), config)
    assert all(batch.num_masked == batch.num_sequences > 50 for batch in found)


def test_slots_do_not_depend_on_where_a_run_begins_or_who_asks():
    config = dataclasses.replace(CONFIG, fixed_shapes=True)
    whole = batches(count=30, config=config)
    shapes = {batch.shapes() for batch, _ in whole}
    resumed = batches(whole[22][1], count=2, config=config)
    shared = batches(count=4, config=config, group=3, rank=2, ranks=3, workers=1)
    shapes |= {batch.shapes() for batch, _ in (*resumed, *shared)}
    assert len(shapes) == 1
