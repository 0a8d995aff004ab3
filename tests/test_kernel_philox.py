from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from fastbert.kernels import ops
from fastbert.kernels.philox import Rng, drop_signs, keep_mask, keep_masks, keep_scale

COORDINATES = [field.name for field in dataclasses.fields(Rng) if field.type == "int"]
SHAPE = (257, 129)


def mask(rng: Rng, dropout_p: float = 0.3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return keep_mask(SHAPE, dropout_p, rng, torch.empty(0, dtype=dtype))


def test_the_same_coordinates_give_the_same_mask_whatever_else_was_drawn():
    first = mask(Rng(7, 3, 1, 2, 1))
    torch.rand(5)
    assert torch.equal(first, mask(Rng(7, 3, 1, 2, 1)))


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_every_coordinate_changes_the_mask(coordinate):
    base = Rng(7, 3, 1, 2, 1)
    other = dataclasses.replace(base, **{coordinate: getattr(base, coordinate) + 1})
    assert not torch.equal(mask(base), mask(other))


def test_coordinates_are_not_interchangeable():
    draws = [mask(Rng(*order)) for order in itertools.permutations([0, 1, 2, 3, 4])]
    for left, right in itertools.combinations(draws[:24], 2):
        assert not torch.equal(left, right)


def test_at_keeps_the_step():
    rng = Rng(seed=7, step=3, micro_batch=1).at(5, 2)
    assert rng == Rng(seed=7, step=3, micro_batch=1, layer=5, site=2)
    assert rng.at(4) == Rng(seed=7, step=3, micro_batch=1, layer=4)


def test_large_and_negative_seeds_are_taken():
    assert not torch.equal(mask(Rng(-1)), mask(Rng(1 << 63)))


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_kept_share_and_values(dropout_p):
    kept = mask(Rng(1), dropout_p)
    values = kept.unique().tolist()
    assert values == [0.0, torch.tensor(keep_scale(dropout_p)).item()]
    elements = kept.numel()
    sigma = math.sqrt(elements * dropout_p * (1.0 - dropout_p))
    assert abs((kept > 0).sum().item() - elements * (1.0 - dropout_p)) < 5 * sigma


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_signs_are_the_same_draw_as_masks(dtype, dropout_p):
    shapes = [(3, 2, 16, 16), (1, 2, 7, 7)]
    like = torch.ones(0, dtype=dtype)
    masks = keep_masks(shapes, dropout_p, Rng(1), torch.empty(0))
    for shape, mask, signs in zip(
        shapes, masks, drop_signs(shapes, dropout_p, Rng(1), like), strict=True
    ):
        values = torch.full(shape, 3.0, dtype=dtype)
        values.view(signs.dtype).bitwise_or_(signs)
        assert torch.equal(values, torch.where(mask == 0.0, -3.0, 3.0).to(dtype))


@pytest.mark.parametrize("dropout_p", [0.1, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_attention_is_right_in_16_bits(dtype, dropout_p):
    """1 / 0.9 is 1.1094 in bf16: over many draws a mean of 0.9984 would show."""
    length, heads = 64, 8
    query = torch.zeros(96 * length, heads, 8, dtype=dtype)
    bounds = torch.arange(97, dtype=torch.int32) * length
    output = ops.attention(
        query, query, torch.ones_like(query), bounds, dropout_p=dropout_p, rng=Rng(1)
    )
    # every row is a mean of so many draws; its columns are the same
    draws = output[..., 0].numel() * length
    sigma = math.sqrt(dropout_p / (1.0 - dropout_p) / draws)
    assert abs(output.double().mean().item() - 1.0) < 3 * sigma < 1.6e-3


@pytest.mark.parametrize("rng", [Rng(1), Rng(1, exact=True)])
def test_dropout_of_bf16_rounds_only_its_result(rng):
    x = torch.randn(64, 64).bfloat16()
    wide = x.float() * keep_mask((64, 64), 0.1, rng, x.float())
    assert torch.equal(ops.dropout(x, 0.1, rng), wide.bfloat16())


def test_masks_of_neighbouring_steps_layers_and_sites_are_independent():
    # a product of two independent masks keeps (1 - p) squared
    base, share = Rng(0, 10, 0, 3, 1), 0.7 * 0.7
    sigma = math.sqrt(mask(base).numel() * share * (1.0 - share))
    for coordinate in COORDINATES:
        other = dataclasses.replace(base, **{coordinate: getattr(base, coordinate) + 1})
        both = ((mask(base) > 0) & (mask(other) > 0)).sum().item()
        assert abs(both - mask(base).numel() * share) < 5 * sigma, coordinate


def test_dtype_and_device_follow_like():
    assert mask(Rng(0), dtype=torch.float64).dtype == torch.float64
