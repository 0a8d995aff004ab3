"""`fastbert validate`: every kernel, forward and each gradient, against fp64 on this machine.

Without a GPU it runs small shapes through Triton's interpreter, in a process of its own, and says
so. `--compile` compiles every shipped configuration ahead of time instead; no GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.bench import attention_checks, compile_matrix, head_checks, kernel_cases
from fastbert.bench.parity import Parity
from fastbert.errors import InputError
from fastbert.kernels import launch, ops
from fastbert.kernels.checks import ACTIVATIONS
from fastbert.kernels.ops import Rng

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = range(5)
DROPOUT = 0.1

ROWS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 4096)
# every variant at these sizes, at the others the one that has everything: compilation takes longer
# than what is compiled
NORM_WIDTHS, MORE_NORM_WIDTHS = (33, 768), (32, 128, 384, 1000, 1024)
HIDDEN, MORE_HIDDEN = ((100, 300), (768, 3072)), ((128, 512), (1024, 4096))
SMALL_NORMS = [(0, 64), (1, 33), (17, 128), (2, 768)]
SMALL_FEED_FORWARDS = [(0, 48, 96), (17, 48, 96)]

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One operator at one shape; `call` takes the tensors that `make` draws in fp64, by name."""

    operator: str
    variant: str
    shape: tuple[int, ...]
    call: Callable[..., Any]
    make: Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Result:
    """The tensor nearest to its bound, of one check in one dtype.

    Attributes:
        tensor: an output or a gradient.
        error, torch_error: root mean square distance from fp64; PyTorch's in the same dtype.
        ratio: the first over the second.
        share: of what the error rule allows; more than 1 fails.
    """

    operator: str
    variant: str
    dtype: str
    shape: tuple[int, ...]
    tensor: str
    error: float
    torch_error: float
    ratio: float
    share: float
    passed: bool


def operators() -> list[str]:
    """Names of the operators that have a kernel."""
    return list(dict.fromkeys(check.operator for check in checks(small=True)))


def checks(*, small: bool) -> Iterator[Check]:
    """Every operator that has a kernel, over the shape classes; `small` for the interpreter."""
    for parts in (*attention_checks.checks(small=small), *head_checks.checks(small=small)):
        yield Check(*parts)
    if small:
        for shape in SMALL_NORMS:
            yield from _norm_checks(*shape)
        for sizes in SMALL_FEED_FORWARDS:
            yield from _feed_forward_checks(*sizes)
        return
    for rows in ROWS:
        for width in NORM_WIDTHS:
            yield from _norm_checks(rows, width)
        for width in MORE_NORM_WIDTHS:
            yield from _norm_checks(rows, width, everything=False)
    yield from _norm_checks(129, 8192, everything=False)
    for rows in ROWS:
        for pair in HIDDEN:
            yield from _feed_forward_checks(rows, *pair)
        for pair in MORE_HIDDEN:
            yield from _feed_forward_checks(rows, *pair, everything=False)


def validate(device: torch.device, found: Iterator[Check]) -> Iterator[Result]:
    """Judge each check by the error rule, pooled over five seeds, in every dtype."""
    for check in found:
        for dtype in DTYPES:
            yield _judge(check, dtype, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything passed, 1 where something failed."""
    options = _parser().parse_args(arguments)
    if options.quick and not options.compile:
        raise InputError("validate: --quick is of --compile")
    if options.compile and options.operators:
        raise InputError("validate: --compile takes no operators: it compiles every kernel")
    unknown = set(options.operators) - set(operators())
    if unknown:
        raise InputError(
            f"validate: no operator {min(unknown)!r} with a kernel, there are "
            f"{', '.join(operators())}"
        )
    if importlib.util.find_spec("triton") is None:
        raise InputError("validate: triton is not installed: pip install triton")
    if options.compile:
        return _compile(options)
    if not (torch.cuda.is_available() or launch.INTERPRETED):
        return _again_interpreted(options)
    return _validate(options)


def _validate(options: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available() and not launch.INTERPRETED
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    say = _silent if options.json else print
    say(ops.describe(device))
    if not on_gpu:
        say("no GPU: small shapes through Triton's interpreter; on a card, run this again there")
    say(
        f"{'operator':<22} {'variant':<18} {'dtype':<9} {'shape':<18} "
        f"{'error':>9} {'PyTorch':>9} {'ratio':>6} {'of bound':>8}"
    )
    results = []
    found = checks(small=not on_gpu)
    wanted = options.operators or operators()
    for result in validate(device, (check for check in found if check.operator in wanted)):
        results.append(result)
        say(_line(result), flush=True)
    failed = sum(not result.passed for result in results)
    if options.json:
        print(json.dumps({"device": str(device), "results": [asdict(r) for r in results]}))
    say(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _compile(options: argparse.Namespace) -> int:
    say = _silent if options.json else print
    todo = compile_matrix.jobs(kernel_cases.cases(), options.quick)
    architectures = {job.architecture for job in todo}
    say(f"{len(todo)} compilations for {len(architectures)} architectures")
    rows = []
    for number, row in enumerate(compile_matrix.run(todo, options.processes), start=1):
        rows.append(row)
        if number % 50 == 0:
            say(f"{number} of {len(todo)}", flush=True)
    failed = sum(bool(row.failures) for row in rows)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    say(compile_matrix.table(rows))
    say(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _again_interpreted(options: argparse.Namespace) -> int:
    # the interpreter takes the compiler's place when triton is imported, and stays there
    command = [sys.executable, "-m", "fastbert.bench", "validate"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("FASTBERT_BACKEND", None)
    command += ["--json"] * options.json + options.operators
    return subprocess.run(command, env=environment).returncode


def _judge(check: Check, dtype: torch.dtype, device: torch.device) -> Result:
    parity = Parity(dtype)
    for seed in SEEDS:
        drawn = check.make(torch.Generator().manual_seed(seed))
        rounded = {name: value.to(dtype) for name, value in drawn.items()}
        with ops.use_backend("triton"):
            ours = _run(check.call, rounded, dtype, device, seed)
        with ops.use_backend("reference"):
            theirs = _run(check.call, rounded, dtype, device, seed)
            oracle = _run(check.call, rounded, torch.float64, device, seed)
        parity.add(ours, theirs, oracle)
    tensor, error, torch_error, share = parity.worst_tensor()
    return Result(
        check.operator,
        check.variant,
        str(dtype).removeprefix("torch."),
        check.shape,
        tensor,
        error,
        torch_error,
        error / torch_error if torch_error else float(error > 0),
        share,
        not parity.failures(),
    )


def _run(
    call: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    leaves = {
        name: value.to(device, dtype, copy=True).requires_grad_() for name, value in inputs.items()
    }
    outputs = call(**leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(seed + len(SEEDS))
    # every dtype holds what bf16 can hold
    flowing = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in outputs]
    torch.autograd.backward(outputs, flowing)
    results = {f"output[{number}]": t.detach() for number, t in enumerate(outputs)}
    gradients = {f"grad {name}": t.grad for name, t in leaves.items() if t.grad is not None}
    return results | gradients


def _norm_checks(rows: int, width: int, *, everything: bool = True) -> Iterator[Check]:
    shape = (rows, width)

    def parts(generator: torch.Generator) -> Inputs:
        return {
            "x": _normal(generator, rows, width),
            "weight": 1 + _normal(generator, width) / 8,
            "bias": _normal(generator, width),
        }

    def whole(generator: torch.Generator) -> Inputs:
        more = {"x_bias": _normal(generator, width), "residual": _normal(generator, rows, width)}
        return parts(generator) | more

    def views(generator: torch.Generator) -> Inputs:
        made = parts(generator)
        return {**made, "x": _normal(generator, rows, 3, width)}

    def of_views(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm(x[:, 1], weight, bias, residual=x[:, 2])

    rng = Rng(seed=1, step=2, layer=3, site=1, exact=True)
    drop = {"dropout_p": DROPOUT, "rng": rng}
    yield Check("layer_norm", "whole, dropout", shape, _with(ops.layer_norm, drop), whole)
    alone = _with(ops.dropout, drop)
    yield Check("dropout", "alone", shape, alone, lambda generator: {"x": parts(generator)["x"]})
    if not everything:
        return
    yield Check("layer_norm", "bare", shape, ops.layer_norm, parts)
    yield Check("layer_norm", "whole", shape, ops.layer_norm, whole)
    yield Check("layer_norm", "strided views", shape, of_views, views)
    with_sum = _with(ops.layer_norm_with_sum, drop)
    yield Check("layer_norm_with_sum", "whole, dropout", shape, with_sum, whole)


def _feed_forward_checks(
    rows: int, hidden_size: int, intermediate_size: int, *, everything: bool = True
) -> Iterator[Check]:
    shape = (rows, hidden_size, intermediate_size)

    def make(wide: int) -> Callable[[torch.Generator], Inputs]:
        def inputs(generator: torch.Generator) -> Inputs:
            return {
                "x": _normal(generator, rows, hidden_size),
                "w1": _normal(generator, wide, hidden_size) * hidden_size**-0.5,
                "b1": _normal(generator, wide),
                "w2": _normal(generator, hidden_size, intermediate_size) * intermediate_size**-0.5,
                "b2": _normal(generator, hidden_size),
            }

        return inputs

    for activation in ACTIVATIONS if everything else ACTIVATIONS[:1]:
        call = _with(ops.feed_forward, {"activation": activation})
        yield Check("feed_forward", activation, shape, call, make(intermediate_size))
    if everything:
        gated = make(2 * intermediate_size)
        yield Check("gated_feed_forward", "gelu", shape, ops.gated_feed_forward, gated)


def _with(operator: Callable[..., Any], constants: dict[str, Any]) -> Callable[..., Any]:
    return lambda **tensors: operator(**tensors, **constants)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _line(result: Result) -> str:
    shape = " x ".join(map(str, result.shape))
    verdict = "pass" if result.passed else f"FAIL {result.tensor}"
    return (
        f"{result.operator:<22} {result.variant:<18} {result.dtype:<9} {shape:<18} "
        f"{result.error:>9.2e} {result.torch_error:>9.2e} {result.ratio:>6.2f} "
        f"{result.share:>8.2f} {verdict}"
    )


def _silent(*words: object, **options: object) -> None:
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert validate", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="operator", help="these alone (all)")
    parser.add_argument("--compile", action="store_true", help="compile for every architecture")
    parser.add_argument("--quick", action="store_true", help="with --compile: the part CI runs")
    parser.add_argument("--processes", type=int, help="with --compile: how many at once")
    parser.add_argument("--json", action="store_true", help="results as JSON and nothing else")
    return parser
