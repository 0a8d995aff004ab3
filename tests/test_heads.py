from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import check_operator
from tiny import stirred, tiny_config, tiny_examples

from fastbert.heads import HEAD_LAYER, MaskedLMHead, Pooler, Projection
from fastbert.kernels.ops import Rng
from fastbert.models import BertForPreTraining

CONFIG = tiny_config(classifier_dropout=0.4)


def head_as_operator(head, operator):
    """A function of (x, **parameters) that check_operator can call in any dtype."""

    def call(x, **parameters):
        named = {name.replace("__", "."): tensor for name, tensor in parameters.items()}
        return torch.func.functional_call(head, named, (operator, x))

    return call


class Caller(torch.nn.Module):
    """Hands a head's parameters to any function of (head, x)."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, operator, x):
        return operator(self.head, x)


def head_inputs(head, rows):
    def inputs(generator):
        drawn = {"x": torch.randn(rows, 36, generator=generator, dtype=torch.float64)}
        for name, parameter in head.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            offset = 1.0 if name.endswith("norm.weight") else 0.0
            drawn["head__" + name.replace(".", "__")] = offset + 0.2 * noise
        return drawn

    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_masked_lm_loss_is_the_cross_entropy_of_the_masked_rows(activation, dtype):
    head = MaskedLMHead(tiny_config(hidden_act=activation))
    head.word_weight = torch.nn.Parameter(torch.empty(67, 36))
    positions = torch.tensor([4, 0, 9, 0, 0])
    labels = torch.tensor([5, 66, 0, -100, -100])

    def ours(head, x):
        return head.loss(x, positions, labels, head.word_weight).loss_sum

    def theirs(head, x):
        rows = F.linear(x[positions], head.dense.weight, head.dense.bias)
        rows = F.gelu(rows, approximate="tanh" if activation == "gelu_new" else "none")
        rows = F.layer_norm(rows, (36,), head.norm.weight, head.norm.bias, 1e-12)
        logits = F.linear(rows, head.word_weight, head.bias)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, reduction="sum")

    caller = Caller(head)
    check_operator(
        head_as_operator(caller, ours),
        head_as_operator(caller, theirs),
        head_inputs(head, 10),
        dtype,
    )


def test_masked_lm_counts_what_its_own_logits_get_right():
    head = stirred(MaskedLMHead(CONFIG))
    states, words = torch.randn(30, 36), torch.randn(67, 36)
    best = head(states, words).argmax(dim=1)
    labels = best.clone()
    labels[::2] = (best[::2] + 1) % 67
    _, correct = head.loss(states, torch.arange(30), labels, words)
    assert correct == 15


def test_unused_slots_may_point_at_poison():
    head = stirred(MaskedLMHead(CONFIG))
    words = torch.randn(67, 36)
    results = []
    for filling in (0.0, math.nan):
        states = torch.randn(10, 36, generator=torch.Generator().manual_seed(0))
        states[0] = filling
        states.requires_grad_()
        loss, _ = head.loss(
            states, torch.tensor([4, 7, 0, 0]), torch.tensor([5, 6, -100, -100]), words
        )
        head.zero_grad()
        loss.backward()
        results.append([loss, states.grad, *(p.grad.clone() for p in head.parameters())])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[1][1][[0, 1, 2, 3, 5, 6, 8, 9]] == 0).all()


def test_pooler():
    caller = Caller(Pooler(CONFIG))
    check_operator(
        head_as_operator(caller, lambda head, x: head(x)),
        head_as_operator(
            caller, lambda head, x: torch.tanh(x @ head.dense.weight.T + head.dense.bias)
        ),
        head_inputs(caller.head, 4),
        torch.float32,
    )


def test_classifier_drops_out_with_an_rng_alone():
    classifier = stirred(Projection(CONFIG, 3, 0.4))
    pooled = torch.randn(200, 36)
    plain = classifier(pooled, None)
    assert torch.equal(plain, F.linear(pooled, classifier.dense.weight, classifier.dense.bias))
    dropped = classifier(pooled, Rng(0))
    assert torch.equal(dropped, classifier(pooled, Rng(0)))
    assert not torch.equal(dropped, plain)
    assert not torch.equal(dropped, classifier(pooled, Rng(0, step=1)))
    with torch.no_grad():
        classifier.dense.weight.copy_(torch.eye(3, 36))
        classifier.dense.bias.zero_()
    kept = (classifier(torch.ones(2000, 36), Rng(0)) != 0).sum().item()
    assert abs(kept - 6000 * 0.6) < 5 * math.sqrt(6000 * 0.6 * 0.4)


def test_head_dropout_is_past_any_encoder_layer():
    assert HEAD_LAYER > 10_000


def test_weights_of_objectives_scale_their_losses_alone():
    batch = tiny_examples([9, 20, 5]).batch([0, 1, 2])
    model = stirred(BertForPreTraining.from_config(tiny_config()))
    plain = model(batch)
    # powers of two: scaling by one is exact
    for weights in ((2.0, 0.0), (0.0, 4.0)):
        model.loss_weights = weights
        output = model(batch)
        assert torch.equal(output.masked_lm_loss_sum, plain.masked_lm_loss_sum)
        losses = (
            plain.masked_lm_loss_sum / batch.num_masked,
            plain.sequence_loss_sum / batch.num_labelled,
        )
        expected = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        assert math.isclose(float(output.loss.detach()), float(expected), rel_tol=2**-22)


def test_the_pair_head_has_a_class_for_every_order():
    model = BertForPreTraining.from_config(tiny_config(pair_classes=6))
    assert model(tiny_examples([9]).batch([0])).seq_relationship_logits.shape == (1, 6)
    assert tiny_config(pair_classes=6).to_hugging_face()["pair_classes"] == 6
    assert "pair_classes" not in tiny_config().to_hugging_face()
