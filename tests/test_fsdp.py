"""A model in shards: the gradients, updates and checkpoints of one in one piece."""

from __future__ import annotations

import copy
import errno
import json
import sys
import threading
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from oracle import ErrorRule
from safetensors.torch import load_file, save_file
from test_parallel import run
from tiny import stirred, tiny_config, tiny_corpus, tiny_documents, tiny_tokenizer

from fastbert.data.loader import Loader
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part
from fastbert.data.stream import StreamConfig
from fastbert.errors import InputError
from fastbert.models import BertForPreTraining, Targets
from fastbert.training import sharded_state
from fastbert.training.fsdp import in_one_piece, shard_model
from fastbert.training.model_average import average
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.parallel import Ranks
from fastbert.training.pretrain import PretrainConfig, pretrain
from fastbert.training.sharded_state import finish_writing, load_run, save_run
from fastbert.training.shards import part_of, whole
from fastbert.training.spikes import SpikeGuard
from fastbert.training.state import CHECKPOINTS, TrainState
from fastbert.training.step import accumulate

CPU = torch.device("cpu")
# batches an optimiser step: one of two ranks is a batch short
GROUP, UPDATES = 3, 3
STATE = TrainState(step=7, tokens=77)


def fresh(dtype: torch.dtype = torch.float32, *, recompute: bool = False) -> BertForPreTraining:
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size)
    model = stirred(BertForPreTraining.from_config(config)).to(dtype)
    model.encoder.recompute = recompute
    return model


def gradients(
    model: BertForPreTraining, ranks: Ranks, products: torch.dtype
) -> dict[str, torch.Tensor]:
    """Of one optimiser step, whole, and the loss."""
    stream = StreamConfig(Objective("sop"), token_budget=128, max_seq_len=40)
    deal = {"group": GROUP, "rank": ranks.rank, "ranks": ranks.count}
    with Loader([Part.whole(tiny_corpus())], tiny_tokenizer(), stream, **deal) as loader:
        batches = [batch for batch, _ in islice(loader, -(-GROUP // ranks.count))]
    agreed = ranks.agree(Targets.of(*batches), 0, 0.0, False)
    result = accumulate(
        model, batches, device=CPU, dtype=products, ranks=ranks, targets=agreed.targets
    )
    found = {name: whole(p.grad) for name, p in model.named_parameters()}
    return found | {"loss": result.sums["masked_lm_loss"]}


def updated(model: BertForPreTraining, name: str) -> Optimizers:
    """Move the model by gradients that are drawn: the same, however it lies."""
    optimizers = Optimizers(model, name, learning_rate=1e-2, muon_learning_rate=1e-2)
    for seed in range(UPDATES):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = torch.zeros_like(parameter)
            own = parameter.grad.to_local() if hasattr(parameter, "to_local") else parameter.grad
            own.copy_(part_of(drawn, parameter))
        optimizers.step(1.0)
    return optimizers


def run_rank(folder: Path) -> None:
    """What each process does that `torchrun` starts; the first one leaves what is found."""
    torch.set_num_threads(1)
    ranks = Ranks.from_environment(CPU, sharded=True)
    sums: list[int] = []
    # as this torch calls it
    name = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
    reduce_scatter = getattr(dist, name)
    setattr(
        dist, name, lambda *words, **options: sums.append(1) or reduce_scatter(*words, **options)
    )

    def leave(name: str, tensors: dict[str, torch.Tensor]) -> None:
        if ranks.first:
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)

    for products in (torch.float32, torch.bfloat16):
        model = fresh(recompute=products == torch.bfloat16)
        shard_model(model, ranks, products)
        sums.clear()
        found = gradients(model, ranks, products)
        leave(str(products), found | {"sums": torch.tensor(len(sums))})
    for name in OPTIMIZERS:
        model = fresh()
        shard_model(model, ranks, torch.float32)
        optimizers = updated(model, name)
        guard = SpikeGuard(model, optimizers, 6.0, every=5)
        guard.begin(STATE)
        save_run(folder / f"run-{name}", STATE, model, optimizers, ranks, keeper=guard)
        state = {f"state/{key}": whole(t) for key, t in optimizers.state_tensors().items()}
        leave(name, in_one_piece(model).state_dict() | state)
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks(root, tmp_path_factory):
    """Where two ranks have left their results."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "rank.py"
    script.write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(root / 'tests')!r})\n"
        "from test_fsdp import run_rank\n"
        "run_rank(pathlib.Path(sys.argv[1]))\n"
    )
    run(root, 2, str(script), str(folder))
    return folder


@pytest.fixture
def ranks():
    """This process alone, with a group of its own."""
    alone = Ranks.from_environment(CPU, sharded=True)
    yield alone
    alone.close()
    assert not dist.is_initialized()


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_gradients_of_two_ranks_are_those_of_one_process(two_ranks, products):
    """Summed once a step, with an empty micro-batch, by the error rule against fp64."""
    found = load_file(two_ranks / str(products))
    # two layers and the rest
    assert found["sums"] == 3
    plain = gradients(fresh(products), Ranks(), products)
    oracle = gradients(fresh(torch.float64), Ranks(), torch.float32)
    rule = ErrorRule()
    for name, exact in oracle.items():
        rule.compare(name, found[name].to(plain[name]), plain[name], exact.double())
    rule.assert_within(seeds=1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_of_shards_are_those_of_whole_parameters(two_ranks, name):
    """By the error rule against fp64: sums over a parameter are taken in another order."""
    found = load_file(two_ranks / name)
    plain, exact = fresh(), fresh(torch.float64)
    updated(plain, name)
    updated(exact, name)
    oracle, rule = exact.state_dict(), ErrorRule()
    for key, tensor in plain.state_dict().items():
        rule.compare(key, found[key], tensor, oracle[key])
    rule.assert_within(seeds=1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_two_ranks_saved_one_reads(two_ranks, name, ranks):
    model = stirred(fresh(), seed=9)
    shard_model(model, ranks, torch.float32)
    optimizers = Optimizers(model, name, learning_rate=1e-2, muon_learning_rate=1e-2)
    guard = SpikeGuard(model, optimizers, 6.0, every=5)
    saved = two_ranks / f"run-{name}"
    assert load_run(saved, model, optimizers, ranks, keeper=guard) == STATE
    found = load_file(two_ranks / name)
    state = {f"state/{key}": whole(t) for key, t in optimizers.state_tensors().items()}
    read = in_one_piece(model).state_dict() | state
    assert read.keys() == found.keys() and len(state) >= len(read) / 2
    for key, tensor in found.items():
        assert torch.equal(read[key], tensor), key
    # what a loss spike goes back to is that too
    for parameter in model.parameters():
        parameter.data.zero_()
    assert guard.roll_back(copy.deepcopy(STATE)) == {"from_step": 8, "to_step": 7}
    for key, tensor in in_one_piece(model).state_dict().items():
        assert torch.equal(found[key], tensor), key


def trained(ranks: Ranks, folder: Path, steps: tuple[int, ...]) -> tuple:
    model = fresh()
    shard_model(model, ranks, torch.float32)
    optimizers = updated(model, "adamw")
    for step in steps:
        save_run(folder, TrainState(step=step), model, optimizers, ranks)
    return model, optimizers, ranks


def test_a_flipped_bit_falls_back_and_nothing_is_unpickled(ranks, tmp_path):
    run = trained(ranks, tmp_path, (1, 2))
    newest = tmp_path / CHECKPOINTS / "step-00000002"
    shard = next((newest / "shards").iterdir())
    assert {path.suffix for path in newest.rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
    }
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    said = []
    assert load_run(tmp_path, *run, say=said.append).step == 1
    assert "does not fit its checksum; going back to step 1" in said[0]
    assert (tmp_path / CHECKPOINTS / "damaged-step-00000002").is_dir()
    (tmp_path / CHECKPOINTS / "step-00000001" / "shards" / shard.name).unlink()
    with pytest.raises(InputError, match=r"step-00000001: damaged checkpoint: .*No such file"):
        load_run(tmp_path, *run)


def test_a_full_disk_leaves_what_was_saved(ranks, tmp_path, monkeypatch):
    run = trained(ranks, tmp_path, (1,))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    # inside torch's own writer
    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(InputError, match=r"step-00000002: cannot write: no space left"):
        save_run(tmp_path, TrainState(step=2), *run)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert load_run(tmp_path, *run).step == 1


def test_shards_are_written_beside_training(ranks, tmp_path, monkeypatch):
    """What is saved is what was there at the call; whoever leaves waits for it."""
    model, optimizers, _ = run = trained(ranks, tmp_path, ())
    gate, write = threading.Event(), safetensors.torch.save

    def late(*words, **options):
        assert gate.wait(60)
        return write(*words, **options)

    monkeypatch.setattr("safetensors.torch.save", late)
    before = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    moments = {name: whole(t).clone() for name, t in optimizers.state_tensors().items()}
    state = TrainState(step=3)
    save_run(tmp_path, state, *run, wait=False)
    state.step = 4
    assert not list((tmp_path / CHECKPOINTS).glob("step-*"))
    with torch.no_grad():
        for tensor in [*model.parameters(), *optimizers.state_tensors().values()]:
            tensor.add_(1)
    gate.set()
    assert load_run(tmp_path, *run).step == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole(tensor), before[name]), name
    for name, tensor in optimizers.state_tensors().items():
        assert torch.equal(whole(tensor), moments[name]), name


def test_a_disk_that_is_full_beside_training_is_told_at_the_next_checkpoint(
    ranks, tmp_path, monkeypatch
):
    run = trained(ranks, tmp_path, (1,))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    save_run(tmp_path, TrainState(step=2), *run, wait=False)
    with pytest.raises(InputError, match=r"step-00000002: cannot write: no space left"):
        save_run(tmp_path, TrainState(step=3), *run, wait=False)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000001"]
    # or when the run ends otherwise; and it keeps nothing from being written once there is room
    save_run(tmp_path, TrainState(step=2), *run, wait=False)
    said: list[str] = []
    finish_writing(run[-1], said.append)
    assert len(said) == 1 and "step-00000002: cannot write: no space left" in said[0]
    monkeypatch.undo()
    save_run(tmp_path, TrainState(step=3), *run)
    assert load_run(tmp_path, *run).step == 3


def test_who_leaves_waits_for_what_is_written(ranks, tmp_path, monkeypatch):
    """Even where it was interrupted while it waited."""
    run = trained(ranks, tmp_path, ())
    gate, write = threading.Event(), safetensors.torch.save
    monkeypatch.setattr(
        "safetensors.torch.save",
        lambda *words, **options: (gate.wait(60), write(*words, **options))[1],
    )
    save_run(tmp_path, TrainState(step=3), *run, wait=False)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ranks.writing, "join", interrupted)
        sharded_state.finish_shards(ranks)
    threading.Timer(0.2, gate.set).start()
    ranks.close()
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000003"]


def test_without_checkpoints_a_run_begins_anew(ranks, tmp_path):
    assert load_run(tmp_path, *trained(ranks, tmp_path, ())) == TrainState()


def test_an_error_of_one_rank_is_one_of_all(monkeypatch, tmp_path):
    ranks = Ranks(sharded=True)
    monkeypatch.setattr(ranks, "told_by_any", lambda flag: True)
    with (
        pytest.raises(InputError, match="x: another rank could not write its part"),
        sharded_state._together(ranks, Path("x")),
    ):
        pass


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_documents(40)))
    tiny_tokenizer().save_pretrained(tmp_path / "tok")

    def go(out: str, *, resume: bool = False, **fields) -> dict:
        config = PretrainConfig(
            str(tmp_path / out),
            **{"size": "tiny", "token_budget": 256, "max_seq_len": 32, "dtype": "fp32"} | fields,
        )
        sources = [str(tmp_path / "text.txt")]
        said: list[str] = []
        report = pretrain(
            sources, str(tmp_path / "tok"), config, doc_sep="blank", resume=resume, say=said.append
        )
        return report | {"said": said}

    return go


def test_one_process_in_shards_is_the_run_in_one_piece(settings, tmp_path):
    """From text to a model folder, stopped by its step budget never: the same weights."""
    fields = {"max_steps": 4, "accumulation": 2, "evaluate_minutes": 1e-9}
    plain = settings("plain", **fields)
    often = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 3, "keep_best": True}
    sharded = settings("sharded", parallel="fsdp", **often, **fields)
    assert not dist.is_initialized()
    for name in ("steps", "tokens", "mlm_loss_heldout", "pair_accuracy_heldout"):
        assert plain[name] == sharded[name], name
    weights = [
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("plain", "sharded")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    evaluations = [
        [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").open()]
        for out in ("plain", "sharded")
    ]
    figures = [[r["eval"] for r in records if "eval" in r] for records in evaluations]
    assert figures[0] == figures[1] and len(figures[0]) >= 4
    assert (tmp_path / "sharded" / "best" / "model.safetensors").is_file()
    # nobody takes the mean of shards
    kept = tmp_path / "sharded" / CHECKPOINTS
    assert len(list(kept.iterdir())) == 3
    with pytest.raises(InputError, match="step-00000002: a checkpoint in shards, of --parallel"):
        average([tmp_path / "sharded"], tmp_path / "mean")


def test_mistakes(settings, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--parallel must be ddp or fsdp, got 'tp'"):
        settings("a", parallel="tp", max_steps=1)
    for field, value in (("cuda_graph", True), ("ema", 0.9)):
        flag = "--" + field.replace("_", "-")
        with pytest.raises(InputError, match=f"{flag}: not with --parallel fsdp"):
            settings("a", parallel="fsdp", **{field: value}, max_steps=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--cuda-graph: for one process, torchrun has started 2"):
        settings("a", cuda_graph=True, max_steps=1)
    assert not dist.is_initialized() and not (tmp_path / "a").exists()
    shared = BertForPreTraining.from_config(
        tiny_config(model_type="albert", num_hidden_groups=1, num_hidden_layers=3)
    )
    with pytest.raises(InputError, match="--parallel fsdp: a model whose layers share weights"):
        shard_model(shared, Ranks(), torch.float32)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
