"""Models and steps on a device that is not the host's: what only a GPU would refuse, seen early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from device_cases import FAMILY_FIELDS, GPU, HEADS, batch_of, config, of, trained
from simulated_device import SimulatedDevice
from simulated_device import simulated_device as simulated_device

from fastbert import models
from fastbert.families import FAMILIES
from fastbert.kernels import layout, philox
from fastbert.kernels.ops import Rng
from fastbert.models import BertForPreTraining
from fastbert.task_heads import RelationHead, TransitionScores
from fastbert.tasks.embed import in_batch_loss
from fastbert.tasks.losses import (
    Loss,
    Shaping,
    binary_loss,
    choice_loss,
    class_loss,
    pool_units,
    squared_loss,
)
from fastbert.tasks.tagging import path_loss
from fastbert.tasks.units import TaskBatch
from fastbert.training.optimizer import OPTIMIZERS
from fastbert.training.weight_average import WeightAverage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU to ask")


def never_waiting(device: SimulatedDevice, call: Callable[[], Any]) -> None:
    device.waits.clear()
    call()
    assert not device.waits


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="on the CPU beside"):
        call()


def test_the_simulation_knows_both_sides(simulated_device: SimulatedDevice):
    here, host = torch.zeros(4, 4, device="cuda"), torch.zeros(4, 4)
    assert here.is_cuda and here.device == torch.device("cuda", 0) and not host.is_cuda
    assert here.new_zeros(2).is_cuda and here[0].is_cuda and (here @ here + 1.0).is_cuda
    # a number of the host is an argument of the kernel, a row of numbers is not
    assert (here * torch.tensor(2.0)).is_cuda
    refused(lambda: here + host)
    refused(lambda: here.index_select(0, torch.arange(2)))
    refused(lambda: torch.stack([here[0, 0], torch.tensor(2.0)]))
    leaf = here.clone().requires_grad_()
    refused(lambda: (leaf * leaf).backward(host))
    assert not simulated_device.waits


@pytest.mark.parametrize(
    "asks",
    [
        lambda here: here.sum().item(),
        lambda here: bool(here.any()),
        lambda here: here.tolist(),
        lambda here: here.cpu(),
        lambda here: here.nonzero(),
        lambda here: here[here > 0],
        lambda here: here[torch.arange(2)],
        lambda here: here.copy_(torch.ones(4, 4)),
        lambda here: torch.ones(4, 4).to(here.device),
        lambda here: torch.ones(4, 4).to(here.device, non_blocking=True),
        lambda here: torch.tensor([1.0], device=here.device),
    ],
)
def test_the_simulation_notes_what_the_host_waits_for(simulated_device: SimulatedDevice, asks):
    here = torch.ones(4, 4, device="cuda")
    here.copy_(torch.ones(4, 4).pin_memory(), non_blocking=True)
    assert not simulated_device.waits
    asks(here)
    assert simulated_device.waits


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.bfloat16) for name in OPTIMIZERS]
    + [("adamw", torch.float32), ("muon", torch.float16)],
)
def test_a_step(simulated_device: SimulatedDevice, name, dtype):
    step = trained(BertForPreTraining.from_config(config()), name, dtype)
    step.optimizers.average = WeightAverage(step.model, 0.99)
    batches = [batch_of(), batch_of(1)]
    # the first one makes the optimiser's state
    never_waiting(simulated_device, lambda: step(batches, Rng(3, 0), 1.0))
    never_waiting(simulated_device, lambda: step(batches, Rng(3, 1), 1.0))


@pytest.mark.parametrize(
    "family, recompute",
    [(family, False) for family in FAMILIES] + [("bert", True), ("modernbert", True)],
)
def test_families(simulated_device: SimulatedDevice, family, recompute):
    model = models.BertForMaskedLM.from_config(
        config(model_type=family, **FAMILY_FIELDS.get(family, {}))
    )
    model.encoder.recompute = recompute
    step = trained(model)
    never_waiting(simulated_device, lambda: step([batch_of()], Rng(3, 1), 1.0))


@pytest.mark.parametrize("head", HEADS)
def test_heads(simulated_device: SimulatedDevice, head):
    make, batch = HEADS[head]
    step = trained(make())
    never_waiting(simulated_device, lambda: step([batch(0)], Rng(3, 1), 1.0))
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        sent = batch(0).to(GPU)
        never_waiting(simulated_device, lambda: step.model(sent))


def test_batches_of_one_capacity_compile_nothing_anew(simulated_device: SimulatedDevice):
    step = trained(BertForPreTraining.from_config(config()))
    seen = []
    for seed, lengths in enumerate([(17, 9, 30), (64, 1, 7), (5,)]):
        simulated_device.launches.clear()
        step([batch_of(seed, lengths), batch_of(seed + 9, lengths)], Rng(seed, 17 * seed), 1.0)
        seen.append({(name, known) for name, _, known in simulated_device.launches})
    assert seen[0] == seen[1] == seen[2]
    # nor does a second micro-batch
    names = [name for name, _ in seen[0]]
    assert names.count("_attention_fwd_kernel") == 1 and names.count("_embedding_fwd_kernel") == 1


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 60, (3, 20), device="cuda")
    lengths = torch.tensor([20, 5, 9], device="cuda")[:, None]
    return ids, (torch.arange(20, device="cuda") < lengths).long()


def test_a_padded_call_asks_twice_at_most(simulated_device: SimulatedDevice):
    ids, mask = padded()
    model = of("BertForSequenceClassification").to(GPU).train()
    labels = torch.zeros(3, dtype=torch.int64, device="cuda")
    simulated_device.waits.clear()
    model(ids, mask, labels=labels).loss.backward()
    # for the rows that are real, and for how many have a label
    assert len(simulated_device.waits) == 2, simulated_device.waits


@pytest.mark.parametrize("family", ["Bert", "Albert", "ModernBert"])
def test_an_accelerated_model_asks_once_for_its_mask(simulated_device: SimulatedDevice, family):
    transformers = pytest.importorskip("transformers")
    from fastbert import dropin

    # what a test before this one has put there is on no device of this one's
    dropin._tables.cache_clear()
    shape = {
        **{"vocab_size": 61, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"intermediate_size": 64, "max_position_embeddings": 64},
        **dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id"), 0),
        **dict.fromkeys(("sep_token_id", "eos_token_id"), 1),
    }
    made = getattr(transformers, f"{family}Config")(**shape)
    model = dropin.accelerate(getattr(transformers, f"{family}ForMaskedLM")(made)).to(GPU).train()
    ids, mask = padded()

    def run(mask: torch.Tensor | None) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()

    run(mask)
    simulated_device.waits.clear()
    run(mask)
    assert len(simulated_device.waits) == 1, simulated_device.waits
    never_waiting(simulated_device, lambda: run(None))
    assert simulated_device.launches
    with torch.inference_mode():
        never_waiting(simulated_device, lambda: model(input_ids=ids))


def test_what_an_inference_has_made_is_trained_with(simulated_device: SimulatedDevice):
    """Tables of rotary angles are kept from call to call."""
    transformers = pytest.importorskip("transformers")
    from fastbert import dropin

    dropin._tables.cache_clear()
    made = transformers.ModernBertConfig(
        vocab_size=61, hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=64, pad_token_id=0, cls_token_id=0, sep_token_id=1,
    )  # fmt: skip
    model = dropin.accelerate(transformers.ModernBertModel(made)).to(GPU)
    ids, mask = padded()
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask).last_hidden_state.sum().backward()


def test_attention_alone_in_transformers_layers(simulated_device: SimulatedDevice):
    transformers = pytest.importorskip("transformers")
    from fastbert.attention_interface import register_attention

    made = transformers.BertConfig(
        vocab_size=61, hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=64, attn_implementation=register_attention(),
    )  # fmt: skip
    model = transformers.BertForMaskedLM(made).to(GPU).train()
    ids, mask = padded()
    for given, most in ((mask, 1), (None, 0)):
        simulated_device.waits.clear()
        model(input_ids=ids, attention_mask=given, labels=ids).loss.backward()
        assert len(simulated_device.waits) == most, simulated_device.waits


def test_a_tensor_left_on_the_host_is_found(simulated_device: SimulatedDevice, monkeypatch):
    """In the packed stream's plan, and in what a kernel is given."""
    monkeypatch.setattr(
        layout, "_plan_tiles", lambda bounds, capacity, block: torch.zeros(9, dtype=torch.int32)
    )
    model = of("BertForMaskedLM").to(GPU)
    on_device = replace(batch_of().to(GPU))
    with pytest.raises(AssertionError, match="tiles_ptr is on the CPU"):
        model(on_device)
    monkeypatch.setattr(philox.Rng, "device_state", lambda rng, device: torch.zeros(3).long())
    with pytest.raises(AssertionError, match="_words_kernel: words_ptr is on the CPU"):
        model(on_device, rng=Rng(1))


CU_UNITS = torch.tensor([0, 2, 4, 6])
CHOSEN = torch.tensor([0, 1, 1])
EVEN = Shaping(None, 0.1)
# of logits [6, 3], and of what else lies on the device
TASK_LOSSES: dict[str, Callable[[torch.Tensor, Callable[[Any], Any]], Loss]] = {
    "classes": lambda logits, sent: class_loss(
        logits, sent(torch.tensor([0, 2, -100, 1, 1, 0])), Shaping(sent(torch.ones(3)), 0.1)
    ),
    "labels": lambda logits, sent: binary_loss(logits, sent(torch.ones(6, 3)), EVEN),
    "numbers": lambda logits, sent: squared_loss(logits[:, 0], sent(torch.ones(6)), 0.5),
    "means of units": lambda logits, sent: class_loss(
        pool_units(logits, sent(CU_UNITS), "mean"), sent(CHOSEN), EVEN
    ),
    "greatest of units": lambda logits, sent: class_loss(
        pool_units(logits, sent(CU_UNITS), "max"), sent(CHOSEN), EVEN
    ),
    "choices": lambda logits, sent: choice_loss(logits[:, 0], sent(CU_UNITS), sent(CHOSEN), EVEN),
    "pairs in a batch": lambda logits, sent: in_batch_loss(logits, sent(CU_UNITS), 20.0, EVEN),
    "paths": lambda logits, sent: path_loss(
        logits.repeat(16, 1), sent(tagged()), sent(TransitionScores(3))
    ),
    "relations": lambda logits, sent: class_loss(
        sent(RelationHead(config(), 3))(
            logits.repeat(1, 32), sent(torch.tensor([[0, 1], [2, 5]])), Rng(1).on(GPU)
        ),
        sent(CHOSEN[:2]),
        EVEN,
    ),
}


def tagged() -> TaskBatch:
    packed = batch_of()
    batch = TaskBatch(**{field.name: getattr(packed, field.name) for field in fields(packed)})
    batch.token_labels = torch.arange(96) % 4
    batch.token_labels[batch.token_labels == 3] = -100
    return batch


@pytest.mark.parametrize("loss", TASK_LOSSES)
def test_losses_of_tasks(simulated_device: SimulatedDevice, loss):
    def sent(what: Any) -> Any:
        if isinstance(what, torch.Tensor):
            return what.pin_memory().to(GPU, non_blocking=True)
        # sent before: in training modules and batches are
        before = list(simulated_device.waits)
        what = what.to(GPU)
        simulated_device.waits[:] = before
        return what

    logits = sent(torch.randn(6, 3)).requires_grad_()
    never_waiting(simulated_device, lambda: TASK_LOSSES[loss](logits, sent).total.backward())
    assert logits.grad is not None and logits.grad.is_cuda
