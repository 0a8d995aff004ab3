"""Optimiser steps as functions of tensors: what is skipped, scaled, clipped and captured."""

from __future__ import annotations

import contextlib
import copy
import types

import pytest
import torch
from oracle import SEEDS, ErrorRule
from safetensors.torch import load_file, save_file
from simulated_graph import SimulatedGraph
from simulated_graph import as_on_a_device as as_on_a_device
from tiny import stirred, tiny_config, tiny_examples

from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.models import BertForPreTraining
from fastbert.packing import Capacity
from fastbert.training import loss_scale
from fastbert.training.finetune import FinetuneConfig
from fastbert.training.loop import refuse_graph
from fastbert.training.loss_scale import LossScale
from fastbert.training.muon import Muon, orthogonalised
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.pretrain import PretrainConfig, pretrain
from fastbert.training.step import WARM_STEPS, CapturedStep, CudaGraphs, TrainingStep

LENGTHS = [17, 9, 30]


def batch_of(seed: int, capacity: int = 64):
    batch = tiny_examples(LENGTHS, seed=seed).batch(range(3), Capacity(capacity, 4, 8))
    batch.max_seqlen = 32
    return batch


class Run:
    """A model with its optimisers and the step that moves it."""

    def __init__(self, name: str = "muon", dtype=torch.float32, clip_norm=1.0, graph=None):
        self.model = stirred(BertForPreTraining.from_config(tiny_config()))
        self.optimizers = Optimizers(
            self.model, name, learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.1
        )
        if dtype == torch.float16:
            self.optimizers.loss_scale = LossScale(torch.device("cpu"))
        self.step = TrainingStep(self.model, self.optimizers, dtype, clip_norm)
        if graph is not None:
            self.step = CapturedStep(self.step, graph)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict() | self.optimizers.state_tensors()

    def copies(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.tensors().items()}


def same(left: dict, right: dict) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_finite_gradients_changes_nothing(name):
    run = Run(name)
    for seed in range(2):
        assert run.step([batch_of(seed)], None, 1.0).sums["skipped"] == 0
    before = run.copies()
    hook = run.model.masked_lm.norm.bias.register_hook(lambda gradient: gradient / 0.0)
    result = run.step([batch_of(2)], None, 1.0)
    assert result.sums["skipped"] == 1 and same(before, run.tensors())
    hook.remove()
    assert run.step([batch_of(2)], None, 1.0).sums["skipped"] == 0
    assert not same(before, run.tensors())
    # moments and counters too are those of a run that never saw the bad step
    clean = Run(name)
    for seed in range(3):
        clean.step([batch_of(seed)], None, 1.0)
    assert same(clean.tensors(), run.tensors())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_scales_all_gradients_by_one_factor(name):
    rule = ErrorRule()
    for seed in SEEDS:
        results = []
        for dtype in (torch.float32, torch.float64):
            run = Run(name)
            run.model.to(dtype)
            run.optimizers = Optimizers(run.model, name, learning_rate=1e-2)
            batch = batch_of(seed)
            run.model(batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.125)
            run.optimizers.step(1.0)
            results.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
        run = Run(name, clip_norm=0.125)
        run.optimizers = run.step.optimizers = Optimizers(run.model, name, learning_rate=1e-2)
        run.step([batch_of(seed)], None, 1.0)
        for parameter, value in run.model.named_parameters():
            rule.compare(parameter, value, results[0][parameter], results[1][parameter])
    rule.assert_within()


def test_small_gradients_are_left_as_they_are():
    clipped, whole = Run(clip_norm=1e9), Run(clip_norm=0.0)
    for run in (clipped, whole):
        run.step([batch_of(0)], None, 1.0)
    assert same(clipped.tensors(), whole.tensors())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fp16_learns_and_its_scale_comes_down_to_what_fits(name):
    run = Run(name, torch.float16)
    run.optimizers.loss_scale.scale.fill_(2.0**40)
    skipped = [int(run.step([batch_of(0)], None, 0.1).sums["skipped"]) for _ in range(40)]
    # every overflow halves the scale, and none is left once it fits
    assert skipped[0] == 1 and skipped[-1] == 0
    assert run.optimizers.loss_scale.scale == 2.0 ** (40 - sum(skipped))
    losses = [float(run.step([batch_of(0)], None, 1.0).sums["masked_lm_loss"]) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_scaled_gradients_are_unscaled_to_the_bit():
    """A power of two goes into the loss and comes out of the update."""
    plain, scaled = Run(clip_norm=0.125), Run(clip_norm=0.125)
    scaled.optimizers.loss_scale = LossScale(torch.device("cpu"))
    for run in (plain, scaled):
        run.step([batch_of(0)], None, 1.0)
    assert same(plain.model.state_dict(), scaled.model.state_dict())


def test_the_scale_grows_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scale = LossScale(torch.device("cpu"))
    found = []
    for overflow in (0, 0, 0, 0, 1, 0, 0, 0):
        scale.update(torch.tensor(float(overflow)))
        found.append(scale.scale.item() / loss_scale.INITIAL)
    assert found == [1, 1, 2, 2, 1, 1, 1, 2]


def test_the_scale_is_part_of_the_state():
    run = Run(dtype=torch.float16)
    run.optimizers.loss_scale.scale.fill_(8.0)
    run.step([batch_of(0)], None, 1.0)
    other = Run()
    other.optimizers.load_state_tensors(run.optimizers.state_tensors())
    assert same(other.optimizers.state_tensors(), run.optimizers.state_tensors())
    assert other.optimizers.loss_scale.scale == 8.0
    with pytest.raises(ValueError, match="loss scale: expected"):
        other.optimizers.load_state_tensors({"loss_scale/other": torch.zeros(())})


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_is_torchs(shape):
    rule = ErrorRule()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(shape, generator=generator)
        steps = [torch.randn(shape, generator=generator) for _ in range(3)]
        moved = []
        for kind, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.double)):
            parameter = torch.nn.Parameter(start.to(dtype))
            optimizer = kind(parameter)
            for gradient in steps:
                parameter.grad = gradient.to(dtype)
                optimizer.step()
            moved.append(parameter.detach())
        rule.compare("parameter", *moved)
    rule.assert_within()


def ours(parameter):
    return Muon([parameter], 0.02, 0.1)


def theirs(parameter):
    return torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrix = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix).float())
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.fixture
def simulated(monkeypatch):
    """Batches whose lengths are one plan, which the reference path makes on the host."""
    layout = batch_of(0).layout
    layout.groups(torch.float32)
    layout.num_tokens()
    monkeypatch.setattr("fastbert.packing.Layout", lambda *_: copy.copy(layout))
    monkeypatch.setattr("fastbert.kernels.layout.Layout.copy_", lambda *_: None)
    return SimulatedGraph


def captured(run: Run) -> None:
    SimulatedGraph.kept = [*run.model.parameters(), *run.optimizers.state_tensors().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_captured_step_is_the_eager_one_bit_for_bit(name, dtype, simulated):
    eager, graph = Run(name, dtype), Run(name, dtype, graph=simulated)
    for number in range(WARM_STEPS + 3):
        batches = [batch_of(2 * number), batch_of(2 * number + 1)]
        captured(graph)
        rng = Rng(3, number, exact=True)
        results = [run.step(batches, rng, 0.5 + number / 8) for run in (eager, graph)]
        assert results[0].tokens == results[1].tokens
        assert results[0].targets == results[1].targets
        assert same(results[0].sums, results[1].sums), number
        assert same(eager.tensors(), graph.tensors()), number
    assert (graph.step.eager, graph.step.replayed) == (WARM_STEPS, 3)


def test_a_replay_skips_what_is_not_finite(simulated):
    run = Run(graph=simulated)
    for number in range(WARM_STEPS + 1):
        captured(run)
        run.step([batch_of(number)], None, 1.0)
    before = run.copies()
    with torch.no_grad():
        run.model.masked_lm.bias[3] = float("nan")
    assert run.step([batch_of(9)], None, 1.0).sums["skipped"] == 1
    with torch.no_grad():
        run.model.masked_lm.bias[3] = before["masked_lm.bias"][3]
    assert same(before, run.tensors())


def test_other_shapes_get_a_graph_of_their_own_until_there_are_many(simulated, monkeypatch):
    monkeypatch.setattr("fastbert.training.step.MOST_GRAPHS", 1)
    run = Run(graph=simulated)
    for number in range(WARM_STEPS + 2):
        captured(run)
        run.step([batch_of(number)], None, 1.0)
    assert run.step.replayed == 2
    run.step([batch_of(0), batch_of(1)], None, 1.0)
    assert run.step.replayed == 2 and run.step.eager == WARM_STEPS + 1


def test_every_shape_runs_once_before_it_is_captured(simulated):
    """A kernel that is compiled within a capture is an error."""
    run = Run(graph=simulated)
    one, two = [batch_of(0)], [batch_of(1), batch_of(2)]
    seen = []
    for batches in (one, one, one, two, two, one, two):
        captured(run)
        before = run.step.eager
        run.step(batches, None, 1.0)
        seen.append("eager" if run.step.eager > before else "replayed")
    assert seen == ["eager"] * 4 + ["replayed"] * 3


class Streams:
    """What torch.cuda is asked for by captured steps."""

    def __init__(self, monkeypatch) -> None:
        self.made, self.pools, self.entered = 0, [], 0
        for name, value in (
            ("Stream", self._stream),
            ("current_stream", lambda: types.SimpleNamespace(wait_stream=lambda other: None)),
            ("stream", self._enter),
            ("graph_pool_handle", object),
            ("CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None)),
            ("graph", self._record),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def _stream(self):
        self.made += 1
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def _enter(self, stream):
        self.entered += 1
        return contextlib.nullcontext()

    def _record(self, graph, pool):
        self.pools.append(pool)
        return contextlib.nullcontext()


def test_graphs_share_their_memory_and_one_stream_beside(simulated, monkeypatch):
    monkeypatch.setattr("fastbert.training.step.MOST_GRAPHS", 2)
    streams = Streams(monkeypatch)
    run = Run(graph=CudaGraphs)
    shapes = [[batch_of(seed) for seed in range(count)] for count in (1, 2, 3)]
    for batches in (*[shapes[0]] * 4, *[shapes[1]] * 2, *[shapes[2]] * 2):
        run.step(batches, None, 1.0)
    assert (run.step.eager, run.step.replayed) == (WARM_STEPS + 3, 2)
    assert streams.made == 1 and len(streams.pools) == 2 and len(set(streams.pools)) == 1
    # shapes that no graph is made of stay on the stream where all else is
    assert streams.entered == WARM_STEPS + 1


def test_results_outlive_the_next_replay(simulated):
    run = Run(graph=simulated)
    results = []
    for number in range(WARM_STEPS + 3):
        captured(run)
        results.append(run.step([batch_of(number)], None, 1.0).sums["masked_lm_loss"])
    values = [float(loss) for loss in results]
    assert len(set(values)) == len(values)


def test_reading_the_device_within_a_step_is_seen(simulated, monkeypatch):
    run = Run(graph=simulated)
    monkeypatch.setattr("fastbert.training.step.WARM_STEPS", 0)
    run.step.step.clip_norm = 1.0
    run.step([batch_of(0)], None, 1.0)
    original = Optimizers.update

    def reading(self, clip_norm):
        found = original(self, clip_norm)
        assert float(found.skipped) == 0.0
        return found

    monkeypatch.setattr(Optimizers, "update", reading)
    with pytest.raises(RuntimeError, match="capture: _local_scalar_dense asks the device"):
        run.step([batch_of(0)], None, 1.0)


def test_where_there_is_no_graph_to_be_had():
    with pytest.raises(InputError, match="--cuda-graph: needs a CUDA or HIP device, this run is"):
        refuse_graph(torch.device("cpu"))
    with pytest.raises(InputError, match="--cuda-graph: for one process, torchrun has started 2"):
        refuse_graph(torch.device("cuda"), 2)
    refuse_graph(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_the_flag_is_refused_before_anything_is_read(tmp_path):
    refused = pytest.raises(InputError, match="--cuda-graph: needs a CUDA or HIP device")
    out = str(tmp_path / "run")
    with refused:
        pretrain(["no.txt"], "nowhere", PretrainConfig(out=out, max_steps=1, cuda_graph=True))
    with refused:
        FinetuneConfig("model", "train.tsv", "eval.tsv", out, cuda_graph=True)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_in_bf16_is_trained_in_fp32(tmp_path):
    model = Run().model
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    narrow = {name: value.bfloat16() for name, value in load_file(weights).items()}
    save_file(narrow, weights)
    read = BertForPreTraining.from_pretrained(tmp_path)
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    optimizers = Optimizers(read, "adamw", learning_rate=1e-4)
    before = read.encoder.layers[0].qkv.weight.detach().clone()
    TrainingStep(read, optimizers, torch.bfloat16, 1.0)([batch_of(0)], None, 1.0)
    moved = read.encoder.layers[0].qkv.weight.detach() - before
    # steps finer than bf16 tells apart are kept
    assert (moved != 0).all() and (before.bfloat16() == (before + moved).bfloat16()).any()


@pytest.mark.parametrize("rows", [False, True])
def test_recomputed_layers_give_the_same_gradients_bit_for_bit(rows):
    results = []
    for recompute in (False, True):
        model = Run().model
        model.encoder.recompute = recompute
        batch = batch_of(0)
        if rows:
            # few enough for the last layer to compute them alone
            batch = batch_of(0, capacity=128)
        output = model(batch, rng=Rng(4, 1))
        output.loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | {"loss": output.loss})
    assert same(*results)
