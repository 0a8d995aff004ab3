from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred, tiny_config, tiny_examples

from fastbert.encoder import Encoder, initialise
from fastbert.kernels.ops import Rng
from fastbert.packing import Capacity, PackedBatch

LENGTHS = [17, 1, 64, 16, 16, 3, 129]


def encoder(dtype: torch.dtype = torch.float32, seed: int = 0, **fields) -> Encoder:
    config = tiny_config(**fields)
    model = Encoder(config)
    initialise(model, config, seed)
    return stirred(model, seed).to(dtype)


def states_and_embedding_gradient(
    model: Encoder, batch: PackedBatch, flowing: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the gradient of each token's embedding (norm and dropout done)."""
    kept = []

    def keep(module, arguments, output):
        output.retain_grad()
        kept.append(output)

    handle = model.embeddings.register_forward_hook(keep)
    states = model(batch)
    handle.remove()
    model.zero_grad()
    states.backward(flowing)
    return states.detach(), kept[0].grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16, 16], [33, 32, 31, 5]], ids=str)
def test_other_sequences_do_not_notice_changed_values_bit_for_bit(lengths, dtype):
    model = encoder(dtype)
    examples = tiny_examples(lengths)
    capacity = Capacity(sum(lengths) + 9, len(lengths) + 2, 2 * len(lengths))
    everything = np.arange(len(lengths))
    batch = examples.batch(everything, capacity)
    generator = torch.Generator().manual_seed(1)
    flowing = torch.randn(batch.capacity, 36, generator=generator).to(dtype)
    states, gradient = states_and_embedding_gradient(model, batch, flowing)
    for changed in everything:
        start, end = examples.cu_seqlens[changed : changed + 2]
        other = examples.batch(everything, capacity)
        other.input_ids[start:end] = (other.input_ids[start:end] + 5) % 66 + 1
        other.token_type_ids[start:end] = 1 - other.token_type_ids[start:end]
        changed_flowing = flowing.clone()
        changed_flowing[start:end] = -flowing[start:end].roll(1, 1)
        new_states, new_gradient = states_and_embedding_gradient(model, other, changed_flowing)
        rest = torch.ones(batch.capacity, dtype=torch.bool)
        rest[start:end] = False
        assert torch.equal(states[rest], new_states[rest])
        assert torch.equal(gradient[rest], new_gradient[rest])
        assert not torch.equal(states[start:end], new_states[start:end])
        assert not torch.equal(gradient[start:end], new_gradient[start:end])


def test_a_nan_in_one_sequence_stays_there():
    model = encoder()
    # the last word is used by the middle sequence alone
    examples = tiny_examples([20, 9, 16, 5], vocab_size=66)
    examples.input_ids[20:29] = 66
    with torch.no_grad():
        clean = model(examples.batch([0, 1, 2, 3]))
        model.embeddings.word_embeddings.weight[66] = math.nan
        dirty = model(examples.batch([0, 1, 2, 3]))
    rest = [*range(20), *range(29, 50)]
    assert torch.equal(clean[rest], dirty[rest])
    assert dirty[20:29].isnan().all()


def test_the_tail_gets_no_gradient():
    model = encoder()
    examples = tiny_examples([7, 20])
    snug, roomy = examples.batch([0, 1]), examples.batch([0, 1], Capacity(64, 5, 4))
    flowing = torch.zeros(64, 36)
    flowing[:27] = torch.randn(27, 36)
    _, gradient = states_and_embedding_gradient(model, roomy, flowing)
    assert (gradient[27:] == 0).all()
    # [PAD] fills the tail, and no real token is one
    assert (model.embeddings.word_embeddings.weight.grad[0] == 0).all()
    states, _ = states_and_embedding_gradient(model, snug, flowing[:27])
    assert states.shape == (27, 36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_in_any_order_is_one_at_a_time(dtype):
    """Baseline and oracle see one sequence at a time, in the order of the list."""
    orders = ([0, 1, 2, 3, 4, 5, 6], [6, 2, 5, 0, 4, 3, 1])
    rule = ErrorRule()
    for seed in SEEDS:
        examples = tiny_examples(LENGTHS, seed=seed)
        bounds = examples.cu_seqlens
        flowing = torch.randn(
            sum(LENGTHS), 36, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).bfloat16()
        results = []
        for precision in (dtype, torch.float64):
            model = encoder(dtype, seed).to(precision)
            states = torch.cat([model(examples.batch([n])) for n in range(len(LENGTHS))])
            states.backward(flowing.to(precision))
            results.append({"states": states} | gradients(model))
        for order in orders:
            model = encoder(dtype, seed)
            states = model(examples.batch(order))
            rows = torch.cat([torch.arange(bounds[n], bounds[n + 1]) for n in order])
            states.backward(flowing[rows].to(dtype))
            restored = torch.empty_like(states).index_copy_(0, rows, states)
            ours = {"states": restored} | gradients(model)
            assert ours.keys() == results[0].keys() == results[1].keys()
            for name, oracle in results[1].items():
                rule.compare(f"{order} {name}", ours[name], results[0][name], oracle)
    rule.assert_within()


def test_two_calls_are_bitwise_equal():
    model = encoder()
    batch = tiny_examples(LENGTHS).batch(range(len(LENGTHS)))
    flowing = torch.randn(sum(LENGTHS), 36)
    rng = Rng(3, step=1)
    results = []
    for _ in range(2):
        model.zero_grad()
        states = model(batch, rng)
        states.backward(flowing)
        results.append({"states": states} | gradients(model))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_dropout_follows_rng_alone():
    model = encoder()
    batch = tiny_examples([9, 20]).batch([0, 1])
    plain = model(batch)
    assert torch.equal(plain, model.train()(batch)) and torch.equal(plain, model.eval()(batch))
    dropped = model(batch, Rng(0))
    assert not torch.equal(plain, dropped)
    assert torch.equal(dropped, model(batch, Rng(0)))
    for other in (Rng(1), Rng(0, step=1), Rng(0, micro_batch=1)):
        assert not torch.equal(dropped, model(batch, other))


def test_every_dropout_site_draws_its_own_numbers(monkeypatch):
    from fastbert.kernels import reference, reference_attention

    seen = []

    def watched(draw):
        return lambda *args: (seen.append(args[2]), draw(*args))[1]

    for module, name in ((reference, "keep_mask"), (reference_attention, "drop_signs")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    encoder(num_hidden_layers=3)(tiny_examples([9, 20]).batch([0, 1]), Rng(0))
    assert len(seen) == len(set(seen)) == 1 + 3 * 3


def test_a_sequence_longer_than_the_positions():
    model = encoder(max_position_embeddings=32)
    model(tiny_examples([32]).batch([0]))
    with pytest.raises(ValueError, match=r"sequences must be at most 32 tokens .* got 33"):
        model(tiny_examples([33]).batch([0]))


def test_empty_batches_and_empty_sequences():
    model = encoder()
    assert model(tiny_examples([]).batch([])).shape == (0, 36)
    with_empty = model(tiny_examples([0, 9, 0]).batch([0, 1, 2]))
    assert with_empty.shape == (9, 36) and with_empty.isfinite().all()


def test_initial_weights():
    config = tiny_config(hidden_size=96, initializer_range=0.05)
    model = Encoder(config)
    initialise(model, config, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.abs().max() <= 2 * 0.05, name
            # a normal cut at two standard deviations keeps 88 % of its spread
            spread = 0.05 * 0.8796
            sigma = spread / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - spread) < 5 * sigma, name
            assert abs(parameter.mean().item()) < 5 * spread / math.sqrt(parameter.numel()), name
        else:
            value = 1.0 if "norm.weight" in name else 0.0
            assert (parameter == value).all(), name
    again, other = Encoder(config), Encoder(config)
    initialise(again, config, seed=1)
    initialise(other, config, seed=2)
    first = model.layers[0].qkv.weight
    assert torch.equal(first, again.layers[0].qkv.weight)
    assert not torch.equal(first, other.layers[0].qkv.weight)
    assert not torch.equal(first, model.layers[1].qkv.weight)
