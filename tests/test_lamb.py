"""LAMB and StableAdamW beside their published algorithms, written out in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import SEEDS, ErrorRule

from fastbert.training.lamb import Lamb
from fastbert.training.stable_adamw import StableAdamW

OPTIMIZERS = {"lamb": Lamb, "stable-adamw": StableAdamW}
LR, BETA1, BETA2, EPS, DECAY, STEPS = 0.02, 0.9, 0.98, 1e-6, 0.1, 7


def published(name, weight, gradients, decay):
    """The paper's algorithm, in the dtype of `weight`."""
    weight = weight.clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        m = BETA1 * m + (1 - BETA1) * gradient
        v = BETA2 * v + (1 - BETA2) * gradient**2
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        step = m_hat / (v_hat.sqrt() + EPS)
        if name == "lamb":
            if decay:
                step = step + decay * weight
                if weight.norm() > 0 and step.norm() > 0:
                    step = step * (weight.norm() / step.norm())
            weight = weight - LR * step
        else:
            rms = (gradient**2 / torch.clamp(v_hat, min=EPS**2)).mean().sqrt()
            rate = LR / max(1.0, float(rms))
            weight = weight - rate * decay * weight - rate * step
    return weight


def ours(name, weight, gradients, decay):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = OPTIMIZERS[name](
        [parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=decay
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_published_algorithm(name, decay):
    rule = ErrorRule()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(13, 7, generator=generator)
        # a jump in size, which StableAdamW answers
        gradients = [
            torch.randn(13, 7, generator=generator) * (20.0 if t == 4 else 1.0)
            for t in range(STEPS)
        ]
        plain = published(name, weight, gradients, decay)
        exact = published(name, weight.double(), [g.double() for g in gradients], decay)
        rule.compare("weight", ours(name, weight, gradients, decay), plain, exact)
    rule.assert_within()


def test_a_jump_shortens_stable_adamw_s_step():
    weight = torch.zeros(50)
    quiet = [torch.ones(50)] * 6
    jump = [*quiet[:5], 100 * torch.ones(50)]
    moved = [
        ours("stable-adamw", weight, gradients, 0.0) - ours("stable-adamw", weight, quiet[:5], 0.0)
        for gradients in (quiet, jump)
    ]
    # AdamW would take a step many times as long
    assert moved[1].abs().max() < 2 * moved[0].abs().max()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_are_not_finite_change_nothing_and_scales_are_taken_out(name):
    weight = torch.randn(6, 5)
    gradient = torch.randn(6, 5)
    expected = ours(name, weight, [gradient, gradient], DECAY)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = OPTIMIZERS[name](
        [parameter], lr=torch.tensor(LR), betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
    )
    # a power of two: dividing by it is exact
    optimizer.grad_scale = torch.tensor(4.0)
    for broken in (False, True, False):
        optimizer.found_inf = torch.tensor(float(broken))
        parameter.grad = torch.full_like(weight, float("nan")) if broken else 4 * gradient
        optimizer.step()
    assert torch.equal(parameter.detach(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_gradient_and_a_zero_weight_are_harmless(name):
    zeros = torch.zeros(3, 3)
    assert torch.equal(ours(name, zeros, [zeros, zeros], DECAY), zeros)
    assert ours(name, torch.ones(3, 3), [zeros], DECAY).isfinite().all()
