from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import check_operator
from tiny import stirred, tiny_config, tiny_examples

from fastbert.errors import InputError
from fastbert.heads import DetectionHead
from fastbert.losses import detection_loss
from fastbert.models import BertForReplacedTokenDetection, Targets
from fastbert.packing import IGNORE_INDEX, Capacity

LENGTHS = [12, 30, 1, 17]


def fresh() -> BertForReplacedTokenDetection:
    return stirred(
        BertForReplacedTokenDetection.from_config(tiny_config(model_type="electra", labels=[]))
    )


def judged(capacity: Capacity | None = None, every: int = 1):
    """A packed batch with a label at every so many tokens, the rows beside them ignored."""
    batch = tiny_examples(LENGTHS, masked=False).batch([0, 1, 2, 3], capacity)
    places = torch.arange(batch.input_ids.shape[0])
    labels = (places * 7 % 5 == 0).long()
    labels[places % every != 0] = IGNORE_INDEX
    labels[sum(LENGTHS) :] = IGNORE_INDEX
    return dataclasses.replace(
        batch,
        masked_positions=places,
        labels=labels,
        num_masked=int((labels != IGNORE_INDEX).sum()),
    )


def test_loss_is_binary_cross_entropy_of_the_targets():
    def operator(logits):
        labels = torch.tensor([1, 0, IGNORE_INDEX, 1, 0])
        return detection_loss(logits, labels)[0]

    def baseline(logits):
        chosen, wanted = logits[[0, 1, 3, 4]], torch.tensor([1, 0, 1, 0]).to(logits)
        return (
            -(wanted * logits[[0, 1, 3, 4]].sigmoid().log()).sum()
            - ((1 - wanted) * (1 - chosen.sigmoid()).log()).sum()
        )

    def inputs(generator):
        return {"logits": torch.randn(5, generator=generator, dtype=torch.float64)}

    check_operator(operator, baseline, inputs, torch.float32)
    logits = torch.tensor([2.0, 2.0, float("nan"), -1.0, -1.0], requires_grad=True)
    loss, right = detection_loss(logits, torch.tensor([1, 0, IGNORE_INDEX, 1, 0]))
    loss.backward()
    assert logits.grad.isfinite().all() and logits.grad[2] == 0
    assert loss.isfinite() and right == 2


def test_a_poisoned_tail_leaves_the_loss_alone(monkeypatch):
    model, batch = fresh(), judged(Capacity(70, 6, 20), every=2)
    own, results = model.encoder.forward, []
    for poison in (0.0, float("nan")):
        tail = torch.full((70 - sum(LENGTHS), 36), poison)
        monkeypatch.setattr(
            model.encoder,
            "forward",
            lambda *given, tail=tail: torch.cat([own(*given)[: sum(LENGTHS)], tail]),
        )
        output = model(batch)
        results.append((output.loss, output.masked_lm_correct))
    assert results[0] == results[1] and results[0][0] > 0


def test_targets_of_a_step_divide_the_loss():
    model, batch = fresh(), judged()
    assert model(batch).loss == 2 * model(batch, targets=Targets(2 * sum(LENGTHS), 0)).loss


def test_logits_are_one_number_a_token():
    batch = dataclasses.replace(judged(), masked_positions=None, labels=None, num_masked=0)
    output = fresh()(batch)
    assert output.loss is None and output.logits.shape == (sum(LENGTHS),)


def test_other_families_have_no_discriminator():
    with pytest.raises(InputError, match="BertForReplacedTokenDetection: not a model of family b"):
        BertForReplacedTokenDetection.from_config(tiny_config())


def test_the_head_s_gelu_is_the_configuration_s():
    heads = [
        DetectionHead(tiny_config(model_type="electra", hidden_act=name))
        for name in ("gelu", "gelu_new")
    ]
    heads[1].load_state_dict(heads[0].state_dict())
    states = torch.randn(4, 36)
    assert not torch.equal(heads[0](states), heads[1](states))
