from __future__ import annotations

import importlib
import itertools
import json

import pytest
import torch
from kernel_harness import ON_GPU, runs_kernels

from fastbert.bench import __main__ as bench
from fastbert.bench import head_checks, validate
from fastbert.kernels import launch

if ON_GPU or launch.INTERPRETED:
    from fastbert.kernels import autograd

pytestmark = runs_kernels


@pytest.fixture
def one_shape(monkeypatch):
    """The checks of one LayerNorm shape and one feed-forward shape."""
    found = [*validate._norm_checks(5, 48), *validate._feed_forward_checks(5, 16, 40)]
    monkeypatch.setattr(validate, "checks", lambda small: iter(found))
    monkeypatch.setattr(validate, "operators", lambda: list({check.operator for check in found}))


@pytest.fixture
def one_dtype(monkeypatch):
    monkeypatch.setattr(validate, "DTYPES", [torch.float32])


def test_all_is_well(one_shape, capsys):
    assert bench.main(["validate"]) == 0
    printed = capsys.readouterr().out
    assert ("no GPU: small shapes through Triton's interpreter" in printed) is not ON_GPU
    assert printed.endswith("27 passed, 0 failed\n")


def test_as_json(one_shape, capsys):
    assert bench.main(["validate", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {r["dtype"] for r in results} == {"float32", "float16", "bfloat16"}
    assert {r["operator"] for r in results} == {
        "dropout",
        "layer_norm",
        "layer_norm_with_sum",
        "feed_forward",
        "gated_feed_forward",
    }
    assert all(r["passed"] and r["share"] <= 1 for r in results)


BROKEN = [
    ("layer_norm_fwd", 0, "layer_norm"),
    ("layer_norm_bwd", 0, "layer_norm"),
    ("layer_norm_bwd", 2, "layer_norm"),
    ("bias_activation_bwd", 1, "feed_forward"),
    ("bias_activation_bwd", 2, "feed_forward"),
]


@pytest.mark.parametrize("kernel, output, operator", BROKEN)
def test_a_broken_kernel_is_found(
    kernel, output, operator, one_shape, one_dtype, monkeypatch, capsys
):
    right = getattr(autograd, kernel)

    def wrong(*arguments):
        outputs = right(*arguments)
        if outputs[output].numel():
            # one element of many is wrong
            outputs[output].view(-1)[3] += 1.0
        return outputs

    monkeypatch.setattr(autograd, kernel, wrong)
    assert bench.main(["validate"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if " FAIL " in line]
    assert failed and all(operator in line for line in failed)


@pytest.fixture
def one_head(monkeypatch):
    """The checks of one masked-LM head and one embedding."""
    parts = [*head_checks.head_checks(5, 40, 30), *head_checks.embedding_checks(11, 40)]
    monkeypatch.setattr(validate, "checks", lambda small: (validate.Check(*p) for p in parts))


@pytest.mark.usefixtures("one_head", "one_dtype")
def test_heads_and_embeddings_are_well(capsys):
    assert bench.main(["validate"]) == 0
    assert capsys.readouterr().out.endswith("5 passed, 0 failed\n")


BROKEN_ENDS = [
    ("autograd_masked_lm", "linear_cross_entropy", 0, "linear_cross_entropy"),
    ("autograd_masked_lm", "linear_cross_entropy", 3, "masked_lm_loss"),
    ("autograd_masked_lm", "scatter_rows", None, "masked_lm_loss"),
    ("autograd_embedding", "embedding_fwd", 0, "embedding"),
    ("autograd_embedding", "embedding_bwd", 0, "embedding"),
    ("autograd_embedding", "embedding_bwd", 1, "embedding"),
]


@pytest.mark.usefixtures("one_head", "one_dtype")
@pytest.mark.parametrize("module, kernel, output, operator", BROKEN_ENDS)
def test_a_broken_end_is_found(module, kernel, output, operator, monkeypatch, capsys):
    owner = importlib.import_module(f"fastbert.kernels.{module}")
    right = getattr(owner, kernel)

    def wrong(*arguments):
        outputs = right(*arguments)
        # one element of many is wrong
        (outputs if output is None else outputs[output]).view(-1)[:1] += 1.0
        return outputs

    monkeypatch.setattr(owner, kernel, wrong)
    assert bench.main(["validate"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if " FAIL " in line]
    assert any(line.startswith(operator) for line in failed)


@pytest.mark.usefixtures("one_shape", "one_dtype")
def test_a_kernel_that_leaves_nan_is_found(monkeypatch, capsys):
    right = autograd.bias_activation_fwd

    def wrong(*arguments):
        output = right(*arguments)
        output[-1, -1] = float("nan")
        return output

    monkeypatch.setattr(autograd, "bias_activation_fwd", wrong)
    assert bench.main(["validate"]) == 1
    assert " FAIL output[0]" in capsys.readouterr().out


def test_quick_is_of_compile(capsys):
    assert bench.main(["validate", "--quick"]) == 2
    assert "error: validate: --quick is of --compile" in capsys.readouterr().err


@pytest.mark.usefixtures("one_shape", "one_dtype")
def test_one_operator_alone(capsys):
    assert bench.main(["validate", "--json", "layer_norm_with_sum"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {r["operator"] for r in results} == {"layer_norm_with_sum"}


def test_an_unknown_operator_is_named_with_those_there_are(capsys):
    assert bench.main(["validate", "layernorm"]) == 2
    error = capsys.readouterr().err
    assert "validate: no operator 'layernorm' with a kernel, there are attention, rotary," in error


def test_the_shapes_cover_tails_and_every_class():
    for small in (True, False):
        found = list(validate.checks(small=small))
        assert {c.shape[0] for c in found} >= {0, 17}
        assert {c.variant for c in found} >= {"strided views", "whole, dropout", "gelu_new"}
    whole = set(itertools.chain.from_iterable(c.shape for c in validate.checks(small=False)))
    assert whole >= {1, 15, 16, 17, 127, 129, 513, 128, 384, 768, 1024, 1000, 33, 8192}
