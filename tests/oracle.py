"""How near is near enough: the one error rule, and helpers that run an operator under it.

The oracle is PyTorch in fp64 on the values that the operator was given, that is, after their
rounding to its dtype. Pooled over five seeds, for outputs and every gradient:

    rms(ours - oracle)    <= 1.25 * rms(torch - oracle)    + 2 eps * rms(oracle)
    max |ours - oracle|   <= 2    * max |torch - oracle|   + 2 eps * max |oracle|

where `torch` is PyTorch in the operator's dtype and eps is that of the output's dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEEDS = range(5)
RMS_FACTOR = 1.25
MAX_FACTOR = 2.0
EPS_FACTOR = 2.0
# elements; keeps what follows aligned to 256 bytes in every dtype
GUARD_BAND = 256

Operator = Callable[..., Any]
Inputs = Mapping[str, Any]


@dataclass
class Pool:
    """Errors of one tensor, summed over the seeds."""

    eps: float = 0.0
    comparisons: int = 0
    elements: int = 0
    ours_squares: float = 0.0
    torch_squares: float = 0.0
    oracle_squares: float = 0.0
    ours_max: float = 0.0
    torch_max: float = 0.0
    oracle_max: float = 0.0

    def add(self, ours: Tensor, baseline: Tensor, oracle: Tensor) -> None:
        ours_error, baseline_error = (ours - oracle).abs(), (baseline - oracle).abs()
        self.comparisons += 1
        self.elements += oracle.numel()
        if not oracle.numel():
            return
        self.ours_squares += ours_error.square().sum().item()
        self.torch_squares += baseline_error.square().sum().item()
        self.oracle_squares += oracle.square().sum().item()
        # a NaN must not lose against a number, as it does in Python's max
        self.ours_max = _maximum(self.ours_max, ours_error.max().item())
        self.torch_max = _maximum(self.torch_max, baseline_error.max().item())
        self.oracle_max = _maximum(self.oracle_max, oracle.abs().max().item())

    def failures(self) -> list[str]:
        if not self.elements:
            return []
        rms = [
            math.sqrt(squares / self.elements)
            for squares in (self.ours_squares, self.torch_squares, self.oracle_squares)
        ]
        maximum = [self.ours_max, self.torch_max, self.oracle_max]
        failures = []
        for measure, factor, (ours, baseline, size) in (
            ("rms", RMS_FACTOR, rms),
            ("max", MAX_FACTOR, maximum),
        ):
            bound = factor * baseline + EPS_FACTOR * self.eps * size
            # written so that NaN fails
            if not ours <= bound:
                failures.append(
                    f"{measure} error {ours:.3e} is {_ratio(ours, bound)} the {bound:.3e} allowed "
                    f"(torch in this dtype {baseline:.3e}, oracle {size:.3e}, eps {self.eps:.1e})"
                )
        return failures


class ErrorRule:
    """Gathers comparisons by tensor name; `assert_within` judges them together.

    Example:
        rule = ErrorRule()
        for seed in SEEDS:
            rule.compare("output", ours(seed), torch_same_dtype(seed), oracle_fp64(seed))
        rule.assert_within()
    """

    def __init__(self) -> None:
        self.pools: dict[str, Pool] = {}

    def compare(
        self, name: str, ours: Tensor, torch_same_dtype: Tensor, oracle_fp64: Tensor
    ) -> None:
        """Add one seed's tensors, all of one shape; infinities must agree exactly."""
        if oracle_fp64.dtype != torch.float64:
            raise TypeError(f"{name}: the oracle must be float64, got {oracle_fp64.dtype}")
        shapes = [tuple(t.shape) for t in (ours, torch_same_dtype, oracle_fp64)]
        assert shapes[0] == shapes[1] == shapes[2], f"{name}: shapes differ: {shapes}"
        pool = self.pools.setdefault(name, Pool())
        # the finer of two dtypes: a coarse result must not bring its own licence
        eps = min(torch.finfo(t.dtype).eps for t in (ours, torch_same_dtype))
        assert pool.eps in (0.0, eps), f"{name}: the dtype changed between seeds"
        pool.eps = eps
        ours, baseline, oracle = (
            t.detach().double().cpu() for t in (ours, torch_same_dtype, oracle_fp64)
        )
        assert not oracle.isnan().any(), f"{name}: the oracle holds NaN"
        infinite = oracle.isinf()
        assert torch.equal(ours[infinite], oracle[infinite]), f"{name}: infinities differ"
        pool.add(*(t[~infinite] for t in (ours, baseline, oracle)))

    def assert_within(self, seeds: int = len(SEEDS)) -> None:
        """Fail with the ratio to what is allowed, for every tensor outside the rule."""
        assert self.pools, "nothing was compared"
        for name, pool in self.pools.items():
            assert pool.comparisons >= seeds, (
                f"{name}: {pool.comparisons} comparisons, the rule pools {seeds} seeds"
            )
        failures = [
            f"{name}: {failure}" for name, pool in self.pools.items() for failure in pool.failures()
        ]
        assert not failures, "outside the error rule:\n" + "\n".join(failures)


def check_operator(
    ours: Operator,
    theirs: Operator,
    make_inputs: Callable[[torch.Generator], Inputs],
    dtype: torch.dtype,
    *,
    constants: Sequence[str] = (),
    device: str = "cpu",
) -> None:
    """Hold `ours` to the error rule: outputs and the gradient of every floating input.

    Args:
        ours, theirs: called with the inputs by name; return a tensor or a tuple of tensors.
            `theirs` is plain PyTorch and runs twice, in `dtype` and in fp64.
        make_inputs: fp64 tensors and anything else by name, drawn from the generator.
        dtype: of every floating input of `ours`.
        constants: names of floating inputs that need no gradient.
        device: where `ours` and the baseline run.
    """
    rule = ErrorRule()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        inputs = rounded(make_inputs(generator), dtype)
        results = [
            run_operator(operator, inputs, precision, seed, constants=constants, device=device)
            for operator, precision in ((ours, dtype), (theirs, dtype), (theirs, torch.float64))
        ]
        assert results[0].keys() == results[1].keys() == results[2].keys()
        for name, oracle in results[2].items():
            rule.compare(name, results[0][name], results[1][name], oracle)
    rule.assert_within()


def run_operator(
    operator: Operator,
    inputs: Inputs,
    dtype: torch.dtype,
    seed: int,
    *,
    constants: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs and gradients by name, `output[0]`, `grad weight`, ..., in `dtype`.

    The gradient that flows back is drawn from `seed`, the same for every dtype up to rounding.
    """
    arguments = {
        name: _argument(value, dtype, device, needs_gradient=name not in constants)
        for name, value in inputs.items()
    }
    outputs = operator(**arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    results = {f"output[{i}]": t for i, t in enumerate(outputs) if t.is_floating_point()}
    generator = torch.Generator().manual_seed(seed + len(SEEDS))
    flowing = [
        # bf16 has the fewest digits of all: what it can hold, every dtype can
        (t, torch.randn(t.shape, generator=generator, dtype=torch.float64).bfloat16().to(t))
        for t in results.values()
    ]
    torch.autograd.backward(
        [t for t, _ in flowing if t.requires_grad], [g for t, g in flowing if t.requires_grad]
    )
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            assert value.grad is not None, f"no gradient reached {name}"
            results[f"grad {name}"] = value.grad
    return results


def rounded(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs in fp64, holding only values that `dtype` can hold."""
    return {
        name: value.to(dtype).double() if _is_floating(value) else value
        for name, value in inputs.items()
    }


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Inside, fresh memory is NaN between guard bands; leaving asserts that the bands stand.

    Covers torch.empty, torch.empty_like and Tensor.new_empty in floating dtypes.
    """
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    bands: list[tuple[Tensor, int]] = []

    def guarded(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.is_meta:
            return tensor
        if not tensor.is_contiguous() or tensor.requires_grad:
            with torch.no_grad():
                return tensor.fill_(math.nan)
        size = tensor.numel()
        memory = empty(size + 2 * GUARD_BAND, dtype=tensor.dtype, device=tensor.device)
        memory[:GUARD_BAND].fill_(_band_value(tensor.dtype))
        memory[GUARD_BAND : GUARD_BAND + size].fill_(math.nan)
        memory[GUARD_BAND + size :].fill_(_band_value(tensor.dtype))
        bands.append((memory, size))
        # shares the memory without being a view to autograd
        return tensor.set_(memory.untyped_storage(), GUARD_BAND, tensor.shape, tensor.stride())

    torch.empty = lambda *args, **options: guarded(empty(*args, **options))  # type: ignore
    torch.empty_like = lambda *args, **options: guarded(empty_like(*args, **options))  # type: ignore
    Tensor.new_empty = lambda *args, **options: guarded(new_empty(*args, **options))  # type: ignore
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty
    for memory, size in bands:
        value = _band_value(memory.dtype)
        before, after = memory[:GUARD_BAND], memory[GUARD_BAND + size :]
        assert (before == value).all(), f"written before the start of a buffer of {size} elements"
        assert (after == value).all(), f"written past the end of a buffer of {size} elements"


def _band_value(dtype: torch.dtype) -> float:
    # a number no computation arrives at by chance, and one every dtype holds exactly
    return torch.finfo(dtype).max


def _argument(value: Any, dtype: torch.dtype, device: str, *, needs_gradient: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not _is_floating(value):
        return value.to(device)
    return value.detach().to(device=device, dtype=dtype, copy=True).requires_grad_(needs_gradient)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _maximum(left: float, right: float) -> float:
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)


def _ratio(error: float, bound: float) -> str:
    return f"{error / bound:.2f} times" if bound else "over"
