from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastbert.kernels.philox import (
    Rng,
    exact_mask,
    keep_mask,
    keep_scale,
    keep_threshold,
    philox,
    score_mask,
    score_words,
    subkey,
)

# Random123's published vectors (kat_vectors): rounds, counter, key, result
VECTORS = [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
SHAPE = (512, 768)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("rounds, counter, key, expected", VECTORS)
def test_known_answers(rounds, counter, key, expected):
    counters = tuple(torch.tensor([word]) for word in words(counter))
    result = philox(counters, tuple(words(key)), rounds)
    assert [int(word) for word in result] == words(expected)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_mean_keep_rate_is_within_five_sigma(dropout_p):
    mask = exact_mask(SHAPE, dropout_p, Rng(seed=1))
    count = mask.numel()
    kept = (mask > 0).sum().item()
    share = 1 / keep_scale(dropout_p)
    assert abs(kept - count * share) <= 5 * math.sqrt(count * share * (1 - share))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(keep_scale(dropout_p)).item()}


@pytest.mark.parametrize("dropout_p", [0.0, 1e-6, 0.1, 0.3, 0.999, 0.9999999])
def test_scale_and_threshold_agree(dropout_p):
    kept = 65536 - keep_threshold(dropout_p)
    assert kept >= 1
    assert kept * keep_scale(dropout_p) == pytest.approx(65536)
    assert abs(keep_threshold(dropout_p) / 65536 - dropout_p) <= 1 / 65536


@pytest.mark.parametrize(
    "shift", [(0, 1), (0, 2), (0, 7), (0, 8), (0, 64), (1, 0), (2, 0), (1, 1), (16, 0)]
)
def test_neighbours_are_uncorrelated(shift):
    mask = (exact_mask(SHAPE, 0.5, Rng(seed=2)) > 0).double() * 2 - 1
    rows, columns = SHAPE[0] - shift[0], SHAPE[1] - shift[1]
    product = mask[:rows, :columns] * mask[shift[0] :, shift[1] :]
    # a sum of n signs has a standard deviation of sqrt(n)
    assert abs(product.sum().item()) <= 5 * math.sqrt(product.numel())


def test_draws_are_uncorrelated():
    rngs = [
        Rng(seed=seed, step=step, micro_batch=micro_batch, layer=layer, site=site)
        for seed, step, micro_batch, layer, site in itertools.product(
            (3, 4), (0, 1), (0, 1), *2 * [(0, 1)]
        )
    ]
    masks = [(exact_mask((64, 256), 0.5, rng) > 0).double() * 2 - 1 for rng in rngs]
    for left, right in itertools.combinations(masks, 2):
        assert abs((left * right).sum().item()) <= 5 * math.sqrt(left.numel())


@pytest.mark.parametrize("change", ["seed", "step", "layer", "site", "micro_batch"])
def test_every_coordinate_counts(change):
    before, after = Rng(seed=5), Rng(**{"seed": 5, change: 6})
    assert not torch.equal(exact_mask(SHAPE, 0.5, before), exact_mask(SHAPE, 0.5, after))


def test_the_high_bits_of_the_seed_count():
    assert subkey(Rng(seed=1)) != subkey(Rng(seed=1 + (1 << 40)))


def test_a_draw_repeats():
    rng = Rng(seed=6, exact=True)
    like = torch.empty(0)
    assert torch.equal(keep_mask(SHAPE, 0.1, rng, like), keep_mask(SHAPE, 0.1, rng, like))


def test_masks_follow_the_token_wherever_it_is_packed():
    sequence_ids = torch.tensor([7, 7, 7, 2, 2], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
    rng = Rng(seed=8)
    packed = exact_mask((5, 40), 0.5, rng.rows(sequence_ids, positions))
    order = torch.tensor([3, 4, 0, 1, 2])
    moved = exact_mask((5, 40), 0.5, rng.rows(sequence_ids[order], positions[order]))
    assert torch.equal(packed[order], moved)
    assert not torch.equal(packed[0], packed[3])


def test_a_narrow_mask_is_the_start_of_a_wide_one():
    wide, narrow = (exact_mask((3, width), 0.5, Rng(seed=9)) for width in (64, 33))
    assert torch.equal(wide[:, :33], narrow)


def test_row_coordinates_must_fit():
    rng = Rng(seed=1).rows(torch.zeros(3, dtype=torch.int32), None)
    with pytest.raises(ValueError, match=r"rng.sequence_ids must be \[5\], one a row, got \[3\]"):
        exact_mask((5, 8), 0.1, rng)


def test_exact_masks_have_rows_and_columns():
    with pytest.raises(ValueError, match=r"for \[rows, columns\], got \[5\]"):
        keep_mask((5,), 0.1, Rng(seed=1, exact=True), torch.empty(0))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 12345, 2**32])
def test_the_state_draws_what_the_numbers_draw(seed):
    rng = Rng(seed, step=3, micro_batch=2, layer=1 << 20, site=5)
    for own in (rng, rng.rows(None, torch.arange(9, dtype=torch.int32))):
        assert torch.equal(exact_mask((9, 20), 0.3, own.on("cpu")), exact_mask((9, 20), 0.3, own))


def test_the_state_decides_where_the_numbers_are_stale():
    rng = Rng(seed=1, step=5, micro_batch=1).on("cpu")
    rng.state.copy_(torch.tensor([1, 6, 0]))
    fresh = Rng(seed=1, step=6, micro_batch=0)
    assert torch.equal(exact_mask((9, 20), 0.3, rng), exact_mask((9, 20), 0.3, fresh))


def score_signs(rng: Rng, tokens: int = 256, heads: int = 4) -> torch.Tensor:
    """[heads, tokens, tokens], +1 where a score of one long sequence is kept at one half."""
    mask = score_mask(*score_words(rng, tokens, heads), 0.5)
    return (mask > 0).double() * 2 - 1


def assert_balanced(product: torch.Tensor) -> None:
    # a sum of n signs has a standard deviation of sqrt(n)
    assert abs(product.sum().item()) <= 5 * math.sqrt(product.numel())


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_mean_keep_rate_of_scores_is_within_five_sigma(dropout_p):
    mask = score_mask(*score_words(Rng(seed=1), 512, 4), dropout_p)
    scale = keep_scale(dropout_p, 32)
    kept, count = (mask > 0).sum().item(), mask.numel()
    assert abs(kept - count / scale) <= 5 * math.sqrt(count / scale * (1 - 1 / scale))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(scale).item()}
    # no row and no column is luckier than chance allows, over all of them
    for axis in (-1, -2):
        share = (mask > 0).double().mean(axis)
        sigma = math.sqrt(1 / scale * (1 - 1 / scale) / 512)
        assert (share - 1 / scale).abs().max() <= 6 * sigma


@pytest.mark.parametrize("dropout_p", [0.0, 1e-6, 0.1, 0.5, 0.999])
def test_scale_and_threshold_of_scores_agree(dropout_p):
    kept = 2**32 - keep_threshold(dropout_p, 32)
    assert kept * keep_scale(dropout_p, 32) == pytest.approx(2**32)
    assert abs(keep_threshold(dropout_p, 32) / 2**32 - dropout_p) <= 2**-32


@pytest.mark.parametrize(
    "row_shift, column_shift", [(0, 1), (1, 0), (1, 1), (0, 8), (64, 0), (7, 5)]
)
def test_neighbouring_scores_are_uncorrelated(row_shift, column_shift):
    signs = score_signs(Rng(seed=2))
    there = signs.roll((row_shift, column_shift), (1, 2))
    assert_balanced(signs * there)
    # keys are no mirror of queries
    assert_balanced((signs * signs.mT)[:, torch.ones(256, 256).triu(1).bool()])


def test_heads_and_draws_of_scores_are_uncorrelated():
    signs = score_signs(Rng(seed=2))
    for left, right in itertools.combinations(signs, 2):
        assert_balanced(left * right)
    rngs = [
        Rng(seed=seed, step=step, micro_batch=micro_batch, layer=layer, site=site)
        for seed, step, micro_batch, layer, site in itertools.product((3, 4), *4 * [(0, 1)])
    ]
    draws = [score_signs(rng, 96, 1) for rng in rngs]
    for left, right in itertools.combinations(draws, 2):
        assert_balanced(left * right)


@pytest.mark.parametrize("shift", [1, 2, 16])
def test_four_scores_of_two_rows_and_two_columns_are_independent(shift):
    """Their words cancel out when mixed by xor, so that a weak hash would show here."""
    signs = score_signs(Rng(seed=6), 512)
    rows = signs * signs.roll(shift, 1)
    assert_balanced(rows * rows.roll(1, 2))
    # and those of two layers and two rows, whose words cancel out too
    other = score_signs(Rng(seed=6, layer=1), 512)
    assert_balanced(rows * other * other.roll(shift, 1))
    # the bits near the threshold of one in ten as well
    low = score_mask(*score_words(Rng(seed=6), 512, 4), 0.1) - 1
    pairs = low * low.roll(shift, 1)
    four = pairs * pairs.roll(1, 2)
    spread = low.square().mean().item() ** 2
    assert abs(four.sum().item()) <= 5 * spread * math.sqrt(four.numel())


def test_scores_follow_the_token_wherever_it_is_packed():
    sequence_ids = torch.tensor([7, 7, 7, 2, 2], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
    rng, order = Rng(seed=8), torch.tensor([3, 4, 0, 1, 2])
    packed = score_mask(*score_words(rng.rows(sequence_ids, positions), 5, 2), 0.5)
    rows = rng.rows(sequence_ids[order], positions[order])
    moved = score_mask(*score_words(rows, 5, 2), 0.5)
    assert torch.equal(packed[:, order][:, :, order], moved)


@pytest.mark.parametrize("change", ["seed", "step", "layer", "site", "micro_batch"])
def test_every_coordinate_of_scores_counts(change):
    before, after = Rng(seed=5), Rng(**{"seed": 5, change: 6})
    assert not torch.equal(score_signs(before, 32, 1), score_signs(after, 32, 1))
