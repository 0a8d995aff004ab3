"""Each operator beside PyTorch eager, compiled, and Liger-Kernel; parity first.

On a GPU ours are the Triton kernels, in bf16 at the sizes of BERT-base and BERT-large; times are of
a cold cache, by device events. On a CPU ours are the operators' reference path, in fp32 and bf16,
and attention and the masked-LM loss stand in the same table (on a GPU `bench attention` and `bench
masked-lm` have more of both). `--static` times nothing: bytes, operations, registers, occupancy.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.bench import attention_peers, attention_steps, gpu, kernels_static, masked_lm
from fastbert.bench.attention_peers import Batch, Prepared
from fastbert.bench.attention_steps import HEAD_DIM, HEADS, flowing
from fastbert.bench.distributions import lengths_of
from fastbert.bench.operators import Operator, operators
from fastbert.bench.parity import Parity
from fastbert.bench.providers import BF16, COMPILER
from fastbert.bench.registry import OURS, Case, Provider, Timer, Work
from fastbert.bench.suite import Suite, by_the_clock
from fastbert.bench.timing import Step
from fastbert.kernels import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, CPU_ROWS = 16384, 1024
# rows of the parity check: fp64 at the full size would take longer than the timing
PARITY_ROWS, CPU_PARITY_ROWS = 1031, 67
WIDTHS, CPU_WIDTHS = (768, 1024), (768,)
# of attention on a CPU: sequences of each distribution
CPU_SEQUENCES = {"queries": 64, "sentences": 32, "wiki": 12}
# no compiled peer is begun later than this, so that `make gpu-bench` ends within nine minutes
PEERS_LIMIT_S = 160


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Every operator, forward, and forward with backward."""
    started = time.monotonic()
    on_gpu = device.type == "cuda"
    dtypes = ["bf16"] if on_gpu else list(DTYPES)
    rows, widths = (ROWS, WIDTHS) if on_gpu else (CPU_ROWS, CPU_WIDTHS)
    # bytes are counted in bf16's size, the least that any row moves
    for operator in operators(rows, DTYPES["bf16"].itemsize, widths):
        if options.quick and not operator.backward:
            continue
        late = on_gpu and time.monotonic() - started > PEERS_LIMIT_S
        yield _operator_case(operator, dtypes, device, options, late=late)
    if not on_gpu:
        for name, sequences in CPU_SEQUENCES.items():
            if not options.quick or name == "sentences":
                yield _attention_case(name, sequences, dtypes, device)
        yield _masked_lm_case(dtypes, device)


def _operator_case(
    operator: Operator,
    dtypes: Sequence[str],
    device: torch.device,
    options: argparse.Namespace,
    *,
    late: bool,
) -> Case:
    found = []
    rivals: dict[str, tuple[Callable[[], Callable[..., Tensor]], tuple[str, ...]]] = {
        "eager": (lambda: operator.plain, ())
    }
    if device.type == "cuda" or options.compile:
        rivals["compiled"] = (lambda: torch.compile(operator.plain), (COMPILER,))
    if options.autotune and operator.operations:
        tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")
        rivals["max-autotune"] = (lambda: tuned(operator.plain), (COMPILER,))
    liger = operator.liger
    if liger is not None and device.type == "cuda":
        rivals["liger"] = (lambda: liger, ("liger_kernel",))
    for dtype in dtypes:
        needs = (BF16,) if dtype == "bf16" else ()
        make = functools.partial(step, operator, operator.ours, dtype, device)
        check = functools.partial(parity, operator, dtype, device)
        found.append(Provider(OURS, dtype, make, check, needs))
        for name, (load, more) in rivals.items():
            make = functools.partial(_loaded, load, operator, dtype, device)
            absent = "the time is up" if late and more else ""
            found.append(Provider(name, dtype, make, needs=(*needs, *more), absent=absent))
    shape = " x ".join(map(str, operator.shape))
    work = Work(0, 0, operator.operations, operator.moved_bytes)
    conditions = {"operator": operator.name, "shape": list(operator.shape)}
    return Case("kernels", f"{operator.name}, {shape}", work, found, conditions)


def parity(operator: Operator, dtype: str, device: torch.device, rows: int | None = None) -> Parity:
    """Our path against the operator's reference in the dtype and in fp64, on fewer rows."""
    rows = rows or (PARITY_ROWS if device.type == "cuda" else CPU_PARITY_ROWS)
    compute = DTYPES[dtype]
    judged = Parity(compute)
    # on a CPU ours is the reference: what it is held to is plain PyTorch
    plain = operator.ours if "dropout" in operator.name else operator.plain
    backend = "triton" if device.type == "cuda" else "reference"
    runs = ((operator.ours, backend, compute), (plain, "reference", compute),
            (plain, "reference", torch.float64))  # fmt: skip
    results = []
    for call, path, kept in runs:
        with ops.use_backend(path):
            leaves = _leaves(operator, rows, compute, kept, device)
            # the same dropout on all sides, on a CPU drawn from torch's generator
            torch.manual_seed(1)
            output = call(**leaves)
            tensors = {"output": output}
            if operator.backward:
                output.backward(flowing(output))
                tensors |= {name: t.grad for name, t in leaves.items() if t.grad is not None}
            results.append(tensors)
    judged.add(*results)
    return judged


def _loaded(
    load: Callable[[], Callable[..., Tensor]], operator: Operator, dtype: str, device: torch.device
) -> Step:
    return step(operator, load(), dtype, device)


def step(operator: Operator, call: Callable[..., Tensor], dtype: str, device: torch.device) -> Step:
    """One call at the full size, gradients too where the operator says so."""
    backend = "triton" if call is operator.ours and device.type == "cuda" else "reference"
    leaves = _leaves(operator, operator.shape[0], DTYPES[dtype], DTYPES[dtype], device)
    targets = [leaf for leaf in leaves.values() if leaf.requires_grad]
    with ops.use_backend(backend):
        gradient = flowing(call(**leaves))

    def forward() -> Any:
        with ops.use_backend(backend), torch.no_grad():
            return call(**leaves)

    def both() -> Any:
        with ops.use_backend(backend):
            return torch.autograd.grad(call(**leaves), targets, gradient)

    return both if operator.backward else forward


def _attention_case(name: str, sequences: int, dtypes: Sequence[str], device: torch.device) -> Case:
    lengths = lengths_of(name, sequences).tolist()
    tokens, longest = sum(lengths), max(lengths)

    def make(prepare: Callable[[Batch], Prepared], dtype: str) -> Step:
        batch = attention_steps.batch_of(lengths, tokens, device, DTYPES[dtype])
        return attention_steps.step_of(prepare, batch, forward_only=False)

    def judged(dtype: str) -> Parity:
        found = Parity(DTYPES[dtype])
        own = attention_steps.batch_of(lengths, tokens, device, DTYPES[dtype])
        exact = Batch(own.qkv.double(), lengths, own.layout)
        sides = ((ours, own), (attention_peers.loop, own), (attention_peers.loop, exact))
        found.add(*({"output": prepare(batch)[0]().detach()} for prepare, batch in sides))
        return found

    ours = attention_steps.ours(0.0)
    rivals = {
        "a call a sequence": attention_peers.loop,
        "padded sdpa": attention_peers.padded(None),
    }
    found = []
    for dtype in dtypes:
        needs = (BF16,) if dtype == "bf16" else ()
        check = functools.partial(judged, dtype)
        found.append(Provider(OURS, dtype, functools.partial(make, ours, dtype), check, needs))
        for title, prepare in rivals.items():
            found.append(
                Provider(title, dtype, functools.partial(make, prepare, dtype), None, needs)
            )
    squares = sum(length * length for length in lengths)
    work = Work(tokens, sequences * longest, 14 * HEADS * HEAD_DIM * squares, 0.0)
    conditions = {"lengths": name, "sequences": sequences, "heads": HEADS, "head_dim": HEAD_DIM}
    title = f"attention, forward + backward, {sequences} x {name}"
    return Case("kernels", title, work, found, conditions)


def _masked_lm_case(dtypes: Sequence[str], device: torch.device) -> Case:
    shape = masked_lm.CPU_SHAPES[0]
    rows, width, vocabulary = shape
    found = []
    for dtype in dtypes:
        needs = (BF16,) if dtype == "bf16" else ()
        for name, loss in masked_lm.providers(device).items():
            check = functools.partial(masked_lm.parity, loss, shape, device, DTYPES[dtype])
            make = functools.partial(masked_lm.step, loss, shape, device, DTYPES[dtype])
            found.append(Provider(name, dtype, make, check, needs))
    work = Work(0, 0, 6.0 * rows * width * vocabulary, 0.0)
    conditions = {"shape": list(shape)}
    title = f"masked-LM loss, forward + backward, {' x '.join(map(str, shape))}"
    return Case("kernels", title, work, found, conditions)


def timer(repeats: int, warm_up: int, device: torch.device) -> Timer:
    """On a GPU kernels of microseconds by device events, rounds in turn; else by the clock."""
    if device.type != "cuda":
        return by_the_clock(repeats, warm_up, device)

    def timed(steps: Mapping[str, Step]) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, call in steps.items():
                times[name].append(gpu.time_ms(call))
        return times

    return timed


def _leaves(
    operator: Operator, rows: int, rounded: torch.dtype, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {name: t.to(device) for name, t in operator.make(rows).items()}
    return {
        # ids stay as they are
        name: t.to(rounded).to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in made.items()
    }


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", action="store_true", help="torch.compile too, on a CPU")
    parser.add_argument("--autotune", action="store_true", help="its max-autotune too")
    parser.add_argument("--static", action="store_true", help="what holds without running a kernel")


SUITE = Suite("kernels", __doc__, cases, repeats=5, warm_up=1, add_flags=_add_flags, timer=timer)


def main(arguments: Sequence[str]) -> int:
    """0 where every row was measured, 1 where one was refused."""
    if "--static" in arguments:
        return kernels_static.main()
    return SUITE.main(arguments)
