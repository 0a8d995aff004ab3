"""Tuning with a clock of our own: no GPU and no Triton are needed to see what is kept."""

from __future__ import annotations

import json

import pytest
import torch

from fastbert.bench import __main__ as bench
from fastbert.bench import tune
from fastbert.kernels import launch

WIDTH = 768


@pytest.fixture
def override_file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "launch.json"
    monkeypatch.setenv("FASTBERT_LAUNCH_FILE", str(path))
    launch.overrides.cache_clear()
    yield path
    launch.overrides.cache_clear()


class Kernel:
    """Stands for a kernel: its results and its time follow the launch it is given."""

    def __init__(self, fastest: launch.Launch, wrong: launch.Launch | None = None) -> None:
        self.fastest, self.wrong = fastest, wrong
        self.sample = torch.ones(4, WIDTH)

    def __call__(self) -> torch.Tensor:
        self.chosen = launch.configure("layer_norm_fwd", self.sample, WIDTH)
        return self.sample * (2.0 if self.chosen == self.wrong else 1.0)

    def time(self, call) -> float:
        call()
        return 1.0 if self.chosen in (self.fastest, self.wrong) else 3.0


def tuned(kernel: Kernel) -> dict:
    subject = tune.Subject("layer_norm_fwd", WIDTH, kernel.sample, kernel)
    return tune.tune([subject], kernel.time, "a card")


ANOTHER = list(tune.candidates("layer_norm_fwd", WIDTH))[-1]


def test_the_fastest_is_kept_and_picked_up(override_file):
    rows = tuned(Kernel(ANOTHER))
    assert tune.write(rows) == 1
    entry = json.loads(override_file.read_text())["rows"][0]
    assert (entry["kernel"], entry["size"], entry["measured_on"]) == (
        "layer_norm_fwd",
        WIDTH,
        "a card",
    )
    assert launch.configure("layer_norm_fwd", torch.ones(4, WIDTH), WIDTH) == ANOTHER


def test_a_candidate_with_other_results_is_not_kept(override_file):
    assert tuned(Kernel(fastest=launch.default("layer_norm_fwd", WIDTH), wrong=ANOTHER)) == {}


def test_the_default_stays_where_nothing_is_faster(override_file):
    assert tuned(Kernel(launch.Launch(rows=1024, columns=1024))) == {}


def test_a_later_run_keeps_what_an_earlier_one_found(override_file):
    tune.write(tuned(Kernel(ANOTHER)))
    other = ("layer_norm_bwd", "cpu", "float32", 384)
    assert tune.write({other: launch.Measured(ANOTHER, "a card")}) == 2
    assert len(launch.overrides()) == 2


def test_a_candidate_that_does_not_run_is_passed_over(override_file, capsys):
    kernel = Kernel(launch.default("layer_norm_fwd", WIDTH))

    def call():
        result = kernel()
        if kernel.chosen == ANOTHER:
            raise RuntimeError("out of resource: shared memory")
        return result

    subject = tune.Subject("layer_norm_fwd", WIDTH, kernel.sample, call)
    assert tune.tune([subject], kernel.time, "a card") == {}
    assert "out of resource" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kernel",
    [
        "layer_norm_fwd",
        "layer_norm_bwd",
        "bias_activation_fwd",
        "linear_activation",
        "embedding_fwd",
        "embedding_bwd",
        "run_sums",
        "cross_entropy",
        "bias_gradient",
    ],
)
def test_the_default_is_among_the_candidates(kernel):
    found = list(tune.candidates(kernel, WIDTH))
    assert found[0] == launch.default(kernel, WIDTH) and len(found) > 4


@pytest.mark.parametrize(
    "kernel", ["attention_fwd", "attention_fwd_owned_128", "attention_bwd_owned_128"]
)
def test_attention_has_candidates_even_without_a_default(kernel):
    found = list(tune.candidates(kernel, 64))
    assert len(set(found)) >= 2
    if "owned" in kernel:
        # a tile that owns its sequences has their longest length
        assert {launched.rows for launched in found} == {128}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert bench.main(["tune"]) == 2
    assert "error: tune: needs a CUDA or HIP device" in capsys.readouterr().err
