from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import signal
from contextlib import closing

import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import gradients, stirred, tiny_config, tiny_corpus, tiny_examples, tiny_tokenizer

from fastbert.data.objectives import Objective
from fastbert.data.stream import Position, PretrainingStream, StreamConfig, prefetch
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.models import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    Targets,
)
from fastbert.training import loop as module
from fastbert.training.loop import (
    Interruption,
    LoopConfig,
    accumulate,
    autocast,
    compute_dtype,
    describe_path,
    train,
)
from fastbert.training.meter import METRICS_FILE, Meter, read_metrics
from fastbert.training.optimizer import Optimizers
from fastbert.training.schedule import Budget
from fastbert.training.state import (
    CHECKPOINTS,
    TrainState,
    finish_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

CPU = torch.device("cpu")
STREAM = StreamConfig(Objective("sop"), token_budget=128, max_seq_len=40, seed=3)


def summed(model, batches, dtype: torch.dtype, rng: Rng | None = None):
    """Loss sums and gradients of one optimiser step."""
    model.zero_grad()
    result = accumulate(model, batches, device=CPU, dtype=dtype, rng=rng)
    return result, {name: value.detach() for name, value in result.sums.items()} | gradients(model)


@pytest.mark.parametrize(
    "architecture, dtype",
    [
        (BertForPreTraining, torch.float32),
        (BertForPreTraining, torch.bfloat16),
        (BertForMaskedLM, torch.float32),
        (BertForSequenceClassification, torch.float32),
    ],
)
def test_micro_batches_are_one_batch(architecture, dtype):
    """Their targets are unequal in number: a mean of means would be another loss."""
    lengths = [40, 9, 1, 3, 1, 1, 22, 7]
    rule = ErrorRule()
    for seed in SEEDS:
        examples = tiny_examples(lengths, seed=seed, classes=2)
        whole = [examples.batch(range(8))]
        parts = [examples.batch(chosen) for chosen in ([0, 6], [2, 4, 5], [1], [3, 7])]
        assert len({batch.num_masked for batch in parts}) > 2
        model = stirred(architecture.from_config(tiny_config(), seed), seed)
        exact = copy.deepcopy(model).double()
        split, ours = summed(model, parts, dtype)
        joined, baseline = summed(model, whole, dtype)
        _, oracle = summed(exact, whole, torch.float32)
        assert split.tokens == joined.tokens == sum(lengths)
        assert split.targets == joined.targets == Targets.of(*whole)
        assert ours.keys() == baseline.keys() == oracle.keys()
        for name, value in oracle.items():
            if value.is_floating_point():
                rule.compare(name, ours[name], baseline[name], value)
            elif dtype == torch.float32:
                assert ours[name] == baseline[name] == value
    rule.assert_within()


def test_micro_batches_draw_their_own_dropout():
    batch = tiny_examples([30, 20]).batch([0, 1])
    model = stirred(BertForMaskedLM.from_config(tiny_config()))
    seen = []
    original = type(model).forward

    class Watching(type(model)):
        def forward(self, *arguments, rng=None, **options):
            seen.append(rng)
            return original(self, *arguments, rng=rng, **options)

    model.__class__ = Watching
    accumulate(model, [batch, batch], device=CPU, dtype=torch.float32, rng=Rng(5, 7))
    assert seen == [Rng(5, 7, 0), Rng(5, 7, 1)]
    accumulate(model, [batch], device=CPU, dtype=torch.float32)
    assert seen[2] is None


class Run:
    """A small run in a folder, which can be stopped and gone on with."""

    def __init__(self, folder, optimizer: str = "muon", resume: bool = False, **config):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        vocab_size = tiny_tokenizer().vocab_size
        self.model = BertForPreTraining.from_config(tiny_config(vocab_size=vocab_size), 4)
        self.optimizers = Optimizers(
            self.model, optimizer, learning_rate=2e-3, muon_learning_rate=4e-3
        )
        self.state = TrainState()
        if resume:
            self.state = load_checkpoint(folder, self.model, self.optimizers)
        options = {"budget": Budget(max_steps=9), "accumulation": 2, "dtype": "fp32", "seed": 6}
        self.config = LoopConfig(**{**options, **config})
        self.log = io.StringIO()
        self.meter = Meter(folder, "train", self.log)

    def go(self, each=None, evaluate=None) -> bool:
        """Train; `each` is called before every micro-batch with its number."""
        stream = PretrainingStream(tiny_corpus(), tiny_tokenizer(), STREAM, self.state.position)
        with closing(prefetch(stream)) as batches:
            counted = watched(batches, each) if each else batches
            return train(
                self.model,
                self.optimizers,
                counted,
                self.config,
                self.state,
                self.meter,
                self.folder,
                evaluate,
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict() | self.optimizers.state_tensors()


def watched(batches, each):
    for number, batch in enumerate(batches):
        each(number)
        yield batch


def same(left: Run, right: Run) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_at(micro_batch: int):
    """A signal as Ctrl-C sends it, in the middle of a step."""

    def each(number: int) -> None:
        if number == micro_batch:
            os.kill(os.getpid(), signal.SIGINT)

    return each


@pytest.mark.parametrize(
    "optimizer, dtype", [("adamw", "fp32"), ("muon", "fp32"), ("muon", "bf16")]
)
def test_a_resumed_run_is_bitwise_the_one_never_stopped(optimizer, dtype, tmp_path):
    options = {"optimizer": optimizer, "dtype": dtype}
    whole = Run(tmp_path / "whole", **options)
    assert whole.go() is True
    first = Run(tmp_path / "run", **options)
    assert first.go(each=stop_at(5)) is False
    assert first.state.step == 3
    second = Run(tmp_path / "run", **options, resume=True)
    assert second.state.step == 3 and second.state.position == first.state.position
    assert second.go(each=stop_at(4)) is False
    third = Run(tmp_path / "run", **options, resume=True)
    assert third.state.step == 6
    assert third.go() is True
    assert same(whole, third)
    assert dataclasses.replace(third.state, seconds=0.0) == dataclasses.replace(
        whole.state, seconds=0.0
    )
    assert third.state.seconds > 0.0


def test_dropout_and_the_seed_matter(tmp_path):
    runs = [
        Run(tmp_path / "a"),
        Run(tmp_path / "b"),
        Run(tmp_path / "c", dropout=False),
        Run(tmp_path / "d", seed=7),
    ]
    for run in runs:
        assert run.go() is True
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2]) and not same(runs[0], runs[3])


def test_a_run_learns(tmp_path):
    run = Run(tmp_path / "run", budget=Budget(max_steps=60), accumulation=1, dropout=False)
    assert run.go() is True
    losses = [r["masked_lm_loss"] for r in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5


def test_every_step_is_in_the_metrics(tmp_path):
    run = Run(tmp_path / "run")
    run.go(each=stop_at(5))
    resumed = Run(tmp_path / "run", resume=True)
    resumed.go()
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)
    # tokens over time, summed over the records, are all tokens
    assert records[-1]["step"] == 9 and records[-1]["tokens"] == resumed.state.tokens
    assert 3 in [r["step"] for r in records]


def test_interruption_keeps_the_handlers_it_found():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_an_outer_interruption_notes_an_inner_one_knows():
    with Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        with Interruption() as inner:
            assert inner.requested
        # the handlers are the outer one's still
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with Interruption() as later:
        assert not later.requested


def test_the_run_ends_with_its_batches(tmp_path):
    run = Run(tmp_path / "run", budget=Budget(max_steps=100))
    stream = PretrainingStream(tiny_corpus(), tiny_tokenizer(), STREAM)
    five = itertools.islice(((batch, stream.position) for batch in stream), 5)
    finished = train(run.model, run.optimizers, five, run.config, run.state, run.meter, run.folder)
    assert finished is True
    # two micro-batches a step, and a last step of one
    assert run.state.step == 3
    assert read_metrics(run.folder)[-1]["step"] == 3


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


def test_a_time_budget_ends_and_a_resumed_run_continues_its_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    budget = Budget(max_minutes=0.1)
    run = Run(tmp_path / "run", budget=budget, accumulation=1)
    assert run.go() is True
    assert run.state.seconds == 6.0 and run.state.step == 6
    assert run.optimizers.learning_rate() < 2e-3
    resumed = Run(tmp_path / "later", budget=budget, accumulation=1)
    resumed.state.seconds = 4.0
    assert resumed.go() is True
    assert resumed.state.step == 2


def test_evaluations_and_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    saved = []
    original = module.save_run
    monkeypatch.setattr(
        module,
        "save_run",
        lambda folder, state, *rest, **options: (
            saved.append(state.step),
            original(folder, state, *rest, **options),
        ),
    )
    run = Run(tmp_path / "run", accumulation=1, evaluate_minutes=3 / 60, checkpoint_minutes=4 / 60)
    evaluated = []

    def evaluate():
        evaluated.append(run.state.step)
        return {"mlm_loss": 1.0}

    assert run.go(evaluate=evaluate) is True
    # an evaluation and a checkpoint each look at the clock once more
    assert evaluated == [3, 5, 8] and saved == [4, 7]
    assert len([r for r in read_metrics(run.folder) if "eval" in r]) == 3
    finish_checkpoint()
    kept = sorted(p.name for p in (run.folder / CHECKPOINTS).iterdir())
    assert kept == ["step-00000004", "step-00000007"]


def poison_weights(run: Run):
    def each(number: int) -> None:
        if number == 4:
            with torch.no_grad():
                run.model.masked_lm.bias[7] = math.nan

    return each


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    run = Run(tmp_path / "run", accumulation=1)
    with pytest.raises(InputError, match="the loss is nan; lower --learning-rate") as failure:
        run.go(each=poison_weights(run))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("cause", ["clock", "signal"])
def test_no_checkpoint_of_a_poisoned_model(cause, tmp_path, monkeypatch):
    """However rarely the meter looks: what is saved has been looked at."""
    run = Run(tmp_path / "run", accumulation=1, checkpoint_minutes=1e9)
    save_checkpoint(run.folder, run.state, run.model, run.optimizers)
    poisoning = poison_weights(run)

    def each(number: int) -> None:
        poisoning(number)
        if number == 4 and cause == "clock":
            run.config.checkpoint_minutes = 0.0
        if number == 4 and cause == "signal":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InputError, match="the loss is nan"):
        run.go(each=each)
    assert [p.name for p in (run.folder / CHECKPOINTS).iterdir()] == ["step-00000000"]
    last = (run.folder / METRICS_FILE).read_text().splitlines()[-1]
    assert json.loads(last)["masked_lm_loss"] is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "up"}, "--schedule must be one of constant, linear, cosine, wsd, got 'up'"),
        ({"dtype": "fp8"}, "--dtype must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"warmup": 1.0}, r"--warmup must be in \[0, 1\), got 1.0"),
        ({"warmup": -0.1}, r"--warmup must be in \[0, 1\), got -0.1"),
        ({"accumulation": 0}, "--accumulation must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(InputError, match=message):
        LoopConfig(Budget(max_steps=1), **fields)


def test_dtypes(monkeypatch):
    assert compute_dtype("fp32", CPU) == torch.float32
    assert compute_dtype("bf16", CPU) == torch.bfloat16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device, fast=fast: fast)
        assert compute_dtype("auto", CPU) == expected
    assert compute_dtype("fp16", CPU) == torch.float16
    with pytest.raises(InputError, match="--dtype must be one of auto, fp32, bf16, fp16"):
        compute_dtype("fp64", CPU)


def test_a_processor_without_the_units_gets_fp32(monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert not module.has_fast_bf16(CPU)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert module.has_fast_bf16(CPU)
    assert not module.has_fast_bf16(torch.device("mps"))


def test_autocast_is_for_bf16_alone():
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(CPU, torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_a_position_is_that_after_the_step(tmp_path):
    run = Run(tmp_path / "run", budget=Budget(max_steps=1), accumulation=3)
    run.go()
    assert run.state.position == Position(0, 0, 3)


def test_a_path_that_cannot_run_is_one_line(monkeypatch):
    monkeypatch.setattr("fastbert.kernels.launch._override", "gpu")
    with pytest.raises(InputError, match="FASTBERT_BACKEND: must be one of"):
        describe_path(torch.device("cpu"))
