"""Other people's code around an accelerated model: peft, Trainer, accelerate, DDP, FSDP2."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import (
    compare_all,
    labels_for,
    our_class,
    padded_batch,
    their_config,
    their_model,
    transformers,
)
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred
from torch import nn

import fastbert
from fastbert.config import EncoderConfig
from fastbert.families import FAMILIES

# nothing here is left to transformers
pytestmark = pytest.mark.filterwarnings("error:accelerate")
NAME = "BertForSequenceClassification"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    batch = padded_batch("bert", NAME, seed)
    return {**batch, **labels_for(NAME, batch, seed)}


def compared(rule: ErrorRule, trained: list[nn.Module], wanted: str = "") -> None:
    """Hold gradients of (ours, stock, stock in fp64) to the error rule."""
    # the bias of a key shifts all scores of a query alike
    sides = [
        {k: g for k, g in gradients(model).items() if wanted in k and not k.endswith("key.bias")}
        for model in trained
    ]
    compare_all(rule, *sides)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]])
def test_lora_trains_as_on_the_stock_model_and_moves_to_it(targets, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS")
    rule = ErrorRule()
    for seed in SEEDS:
        torch.manual_seed(seed)
        stock = peft.get_peft_model(their_model("bert", NAME, seed, **NO_DROPOUT), lora)
        with torch.no_grad():
            for key, parameter in stock.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        fast = fastbert.accelerate(copy.deepcopy(stock))
        oracle = copy.deepcopy(stock).double()
        for model in (fast, stock, oracle):
            model(**batch_of(seed)).loss.backward()
        compared(rule, [fast, stock, oracle], "lora" if "dense" not in targets else "")
    rule.assert_within()
    torch.optim.SGD([p for p in fast.parameters() if p.requires_grad], lr=0.1).step()
    fast.save_pretrained(tmp_path)
    base = their_model("bert", NAME, SEEDS[-1], **NO_DROPOUT)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    trained = fastbert.restore(fast.eval())
    with torch.no_grad():
        assert torch.equal(loaded(**batch_of()).logits, trained(**batch_of()).logits)


def test_an_adapter_put_on_later_is_used():
    peft = pytest.importorskip("peft")
    fast = fastbert.accelerate(their_model("bert", NAME, **NO_DROPOUT))
    before = fast(**batch_of()).logits
    model = peft.get_peft_model(fast, peft.LoraConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.5)
    assert not torch.allclose(model(**batch_of()).logits, before)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_our_own_models_take_adapters_without_being_told_where(family, tmp_path):
    peft = pytest.importorskip("peft")
    name = "BertForSequenceClassification"
    config = EncoderConfig.from_dict(their_config(family, num_labels=3).to_dict())

    def fresh():
        return stirred(our_class(name).from_config(config)).eval()

    batch, base = padded_batch(family, name, 0), fresh()
    lora = peft.LoraConfig(r=2, modules_to_save=["classifier"])
    # an adapter's products are torch's own: so that ours are as well
    with torch.backends.mkldnn.flags(enabled=False):
        before = base(**batch).logits
        adapted = peft.get_peft_model(base, lora)
        assert lora.target_modules == set(fastbert.LORA_TARGETS)
        assert torch.equal(adapted(**batch).logits, before)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.fill_(0.05)
    adapted(**batch).logits.sum().backward()
    trained = {key for key, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {key for key, p in adapted.named_parameters() if p.requires_grad}
    layers = len(base.encoder.layers)
    assert sum("lora_A" in key for key in trained) == 2 * layers
    assert any("classifier" in key for key in trained)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        logits = adapted(**batch).logits
        assert torch.equal(again(**batch).logits, logits)
    assert not torch.equal(logits, before)
    layer = base.encoder.layers[0]
    wanted = layer.qkv.weight + layer.qkv.get_delta_weight("default")
    merged = adapted.merge_and_unload()
    assert type(merged) is our_class(name) and not isinstance(
        merged.encoder.layers[0].qkv, peft.tuners.lora.Linear
    )
    assert torch.equal(merged.encoder.layers[0].qkv.weight, wanted)


def test_stock_models_keep_their_default_targets():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2)
    EncoderConfig().to_dict()
    peft.get_peft_model(their_model("bert", NAME), lora)
    assert lora.target_modules == {"query", "value"}


class Rows(torch.utils.data.Dataset):
    """The rows of one batch, padding and all."""

    def __init__(self, batch: dict[str, torch.Tensor] | None = None) -> None:
        self.batch = batch or batch_of()

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: tensor[row] for name, tensor in self.batch.items()}


def trained_by_trainer(model: nn.Module, folder: Path, checkpointing: bool) -> nn.Module:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train()
    assert trainer.predict(Rows()).predictions.shape == (4, 3)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    pytest.importorskip("accelerate")
    stock = their_model("bert", NAME, **NO_DROPOUT)
    fast = fastbert.accelerate(copy.deepcopy(stock))
    start = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    trained_by_trainer(stock, tmp_path / "stock", checkpointing)
    trained_by_trainer(fast, tmp_path / "fast", checkpointing)
    moved = [(stock.state_dict()[key] - start[key]).norm() for key in start]
    apart = [(fast.state_dict()[key] - stock.state_dict()[key]).norm() for key in start]
    # two steps of AdamW lead both to the same place; single elements may take a step the other way
    # where a gradient is rounding
    assert sum(apart) < 0.02 * sum(moved) and sum(moved) > 0
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "fast" / "checkpoint-2"
    )
    assert saved.state_dict().keys() == stock.state_dict().keys()
    for key, tensor in fast.state_dict().items():
        assert torch.equal(saved.state_dict()[key], tensor), key


def test_trainer_saves_a_tied_decoder_once(tmp_path):
    pytest.importorskip("accelerate")
    fast = fastbert.accelerate(their_model("bert", "BertForMaskedLM", **NO_DROPOUT))
    batch = padded_batch("bert", "BertForMaskedLM", 0)
    batch |= labels_for("BertForMaskedLM", batch, 0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        save_steps=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.Trainer(model=fast, args=arguments, train_dataset=Rows(batch)).train()
    saved, info = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "checkpoint-1", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    words = saved.bert.embeddings.word_embeddings.weight
    assert saved.cls.predictions.decoder.weight is words
    assert torch.equal(words, fast.bert.embeddings.word_embeddings.weight)


def test_accelerate_library():
    library = pytest.importorskip("accelerate")
    stock = their_model("bert", NAME, **NO_DROPOUT).train()
    fast = fastbert.accelerate(copy.deepcopy(stock))
    fast(**batch_of()).loss.backward()
    expected = gradients(fast)
    fast.zero_grad()
    accelerator = library.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(fast, optimizer)
    accelerator.backward(model(**batch_of()).loss)
    found = gradients(accelerator.unwrap_model(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())
    optimizer.step()


RANK = """
import copy, sys, warnings
warnings.filterwarnings("error", message="accelerate: ")
sys.path[:0] = [{tests!r}]
import torch, torch.distributed as dist
import fastbert
from families import padded_batch, labels_for, their_model
from tiny import gradients
rank, world, kind, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
meet = f"tcp://127.0.0.1:{{port}}"
dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
name = "BertForSequenceClassification"
still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
whole = padded_batch("bert", name, 0)
whole |= labels_for(name, whole, 0)
part = {{k: v[rank * 4 // world : (rank + 1) * 4 // world] for k, v in whole.items()}}
plain = their_model("bert", name, **still)
oracle = copy.deepcopy(plain).double()
model = fastbert.accelerate(copy.deepcopy(plain))
if kind == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    wrapped = fully_shard(model, mesh=mesh)
wrapped(**part).loss.backward()
found = {{
    k: (g.full_tensor() if hasattr(g, "full_tensor") else g) for k, g in gradients(model).items()
}}
fastbert.accelerate(plain)(**whole).loss.backward()
oracle(**whole).loss.backward()
truth, alone = gradients(oracle), gradients(plain)
assert found.keys() == alone.keys() == truth.keys()
def distance(one):
    return sum(((one[k].double() - truth[k]).square().sum() for k in truth), torch.zeros(())).sqrt()
ours, bound = distance(found), 1.25 * distance(alone) + 2 * torch.finfo(torch.float32).eps * sum(
    g.square().sum() for g in truth.values()
).sqrt()
assert ours <= bound, (ours, bound)
if rank == 0:
    print("same gradients")
dist.destroy_process_group()
"""


def ranks_agree(root: Path, kind: str, world: int) -> None:
    """`world` processes share a batch and have the gradients of one that has it all."""
    script = RANK.format(tests=str(root / "tests"))
    port = str(20000 + (os.getpid() * 7 + len(kind) + world) % 20000)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(world), kind, port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    assert "same gradients" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_are_one(kind, root):
    """gloo; every rank has half of the rows."""
    ranks_agree(root, kind, world=2)


def test_fsdp2_of_one_process(root):
    ranks_agree(root, "fsdp2", world=1)
