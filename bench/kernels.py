"""`fastbert bench kernels`: each operator beside PyTorch eager, compiled, and Liger-Kernel.

A row whose parity check fails is refused. Without a GPU there are no times: the operators run on
the CPU once, and the static picture is printed, bytes, operations, registers and occupancy.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.bench import compile_matrix, gpu, kernel_cases, machine
from fastbert.bench.parity import Parity
from fastbert.files import atomic_write
from fastbert.kernels import launch, ops
from fastbert.kernels.ops import Rng

DTYPE = torch.bfloat16
ROWS = 16384
# rows of the parity check: fp64 at the full size would take longer than the timing
PARITY_ROWS = 1031
CPU_ROWS = 64
# no compiled peer is begun later than this, so that `make gpu-bench` ends within nine
PEERS_LIMIT_S = 160
# of the embedding
VOCABULARY, POSITIONS, SEGMENTS = 30522, 512, 2
STATIC_ARCHITECTURE = "sm_90"
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name, shape: as printed; `rows` comes first in the shape.
        kernels: names in the compile matrix, for the static picture.
        operator: takes the inputs by name.
        make: fp32 inputs for a number of rows.
        backward: whether gradients are taken too.
        moved_bytes, operations: the least that must be moved and computed, at ROWS rows.
        liger: the same in Liger-Kernel; None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    kernels: tuple[str, ...]
    operator: Callable[..., Tensor]
    make: Callable[[int], Inputs]
    backward: bool
    moved_bytes: float
    operations: float
    liger: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """Times of one case; `share_of_floor` is the floor's time over ours, peers by name."""

    name: str
    shape: tuple[int, ...]
    parity: float
    refused: bool
    ms: float = 0.0
    gb_per_s: float = 0.0
    tflop_per_s: float = 0.0
    share_of_floor: float = 0.0
    peak_mib: float = 0.0
    peers_ms: dict[str, float] | None = None
    peers_failed: dict[str, str] | None = None


def cases() -> Iterator[Case]:
    """LayerNorm and the feed-forward block at the sizes of BERT-base and BERT-large."""
    size = DTYPE.itemsize
    for width in (768, 1024):
        for backward in (False, True):
            # forward x, residual, y; backward dy, x, residual, dx, which is dresidual too
            tensors = 3 + 4 * backward
            kernels = ("layer_norm_fwd", "layer_norm_bwd")[: 1 + backward]
            yield Case(
                "layer_norm" + _direction(backward),
                (ROWS, width),
                kernels,
                ops.layer_norm,
                _norm_inputs(width),
                backward,
                tensors * ROWS * width * size,
                0.0,
                _liger_norm,
            )
            yield Case(
                "layer_norm, dropout" + _direction(backward),
                (ROWS, width),
                kernels,
                _dropped_norm,
                _norm_inputs(width),
                backward,
                (tensors + backward) * ROWS * width * size,
                0.0,
            )
    for hidden_size in (768, 1024):
        intermediate_size = 4 * hidden_size
        products = 2 * ROWS * hidden_size * intermediate_size
        for backward in (False, True):
            yield Case(
                "feed_forward" + _direction(backward),
                (ROWS, hidden_size, intermediate_size),
                ("bias_activation_fwd", "bias_activation_bwd")[: 1 + backward],
                ops.feed_forward,
                _feed_forward_inputs(hidden_size, intermediate_size),
                backward,
                (2 + 3 * backward) * ROWS * hidden_size * size,
                (2 + 4 * backward) * products,
            )

    yield from _embedding_cases()


def _embedding_cases() -> Iterator[Case]:
    for width in (768, 1024):
        for backward in (False, True):
            # forward reads a row of words a token and writes one, positions and segments stay in
            # the cache; backward reads dy and the rows again, writes the sum's gradient in fp32,
            # and reads it three times, once a table, each of which is written once
            rows_bytes = ROWS * width * DTYPE.itemsize
            tables = (VOCABULARY + POSITIONS + SEGMENTS) * width * 4
            yield Case(
                "embedding, dropout" + _direction(backward),
                (ROWS, width),
                ("embedding_fwd", "embedding_bwd")[: 1 + backward],
                _embedded,
                _embedding_inputs(width),
                backward,
                2 * rows_bytes + backward * (2 * rows_bytes + 4 * ROWS * width * 4 + tables),
                0.0,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every row was measured, 1 where one was refused."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        return _static()
    name = torch.cuda.get_device_name()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{name}, torch {torch.__version__}: the card's ceilings come first", flush=True)
    best = gpu.ceilings()
    print(f"copy {best.copy_gb_per_s:.0f} GB/s, bf16 {best.matmul_tflop_per_s:.0f} TFLOP/s")
    rows: list[Row] = []
    started = time.monotonic()
    for case in cases():
        left = time.monotonic() - started < PEERS_LIMIT_S
        rows.append(measure(case, best, compiled=left, autotune=left and options.autotune))
        print(f"measured {case.name} {case.shape}", flush=True)
        if options.results:
            # after every row: what was measured stays, whatever ends the run
            _write(Path(options.results) / f"kernels-{file_name(name)}.json", best, rows)
    print(table(rows))
    return 1 if any(row.refused for row in rows) else 0


def _write(path: Path, best: gpu.Ceilings, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    described = machine.describe(torch.device("cuda"))
    entry = {"machine": described, "ceilings": asdict(best), "rows": [asdict(r) for r in rows]}
    with atomic_write(path) as file:
        json.dump(entry, file, indent=1)


def measure(
    case: Case, best: gpu.Ceilings, *, compiled: bool = True, autotune: bool = False
) -> Row:
    """Parity first; a row that fails it carries no time."""
    parity = _parity(case, torch.device("cuda"), PARITY_ROWS)
    if parity.failures():
        return Row(case.name, case.shape, parity.worst(), refused=True)
    ours = _step(case, "triton", case.operator)
    ms = gpu.time_ms(ours)
    peers = {"eager": case.operator}
    if compiled:
        peers["compiled"] = torch.compile(case.operator)
    if autotune and case.operations:
        peers["max-autotune"] = torch.compile(case.operator, mode="max-autotune-no-cudagraphs")
    if case.liger is not None and importlib.util.find_spec("liger_kernel"):
        peers["liger"] = case.liger
    times, failures = {}, {}
    for name, operator in peers.items():
        try:
            times[name] = gpu.time_ms(_step(case, "reference", operator))
        except Exception as error:  # a peer that breaks is told, and costs no other row
            failures[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Row(
        case.name,
        case.shape,
        parity.worst(),
        refused=False,
        ms=ms,
        gb_per_s=case.moved_bytes / ms / 1e6,
        tflop_per_s=case.operations / ms / 1e9,
        share_of_floor=best.floor_ms(case.moved_bytes, case.operations) / ms,
        peak_mib=gpu.peak_mib(ours),
        peers_ms=times,
        peers_failed=failures,
    )


def table(rows: Sequence[Row]) -> str:
    """Times, rates, the share of the floor, and how many times slower each peer is."""
    lines = [
        f"{'operator':<40} {'shape':<18} {'ms':>8} {'GB/s':>7} {'TFLOP/s':>8} "
        f"{'of floor':>8} {'peak MiB':>8}  ratio to peers"
    ]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        if row.refused:
            lines.append(f"{row.name:<40} {shape:<18} refused: {row.parity:.2f} of the error bound")
            continue
        ratios = "  ".join(f"{n} {t / row.ms:.2f}" for n, t in (row.peers_ms or {}).items())
        ratios += "".join(f"  {n} failed: {why}" for n, why in (row.peers_failed or {}).items())
        lines.append(
            f"{row.name:<40} {shape:<18} {row.ms:>8.4f} {row.gb_per_s:>7.0f} "
            f"{row.tflop_per_s:>8.1f} {row.share_of_floor:>8.2f} {row.peak_mib:>8.1f}  {ratios}"
        )
    return "\n".join(lines)


def programs_at_once(registers: int, num_warps: int, shared_bytes: int) -> int:
    """Programs one sm_90 multiprocessor holds, by its registers, shared memory and warps."""
    threads = 32 * num_warps
    # registers are handed out a warp at a time, 256 at least
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps) if registers else 32
    by_shared = 227 * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_shared, 2048 // threads, 32)


def _static() -> int:
    print("no GPU: kernel speed needs one; what follows holds without running a kernel")
    device = torch.device("cpu")
    found = kernel_cases.cases()
    header = f"{'operator':<40} {'shape':<18} {'MB moved':>9} {'GFLOP':>7} {'parity':>7}"
    print(f"{header}  kernels on {STATIC_ARCHITECTURE}: registers, programs a processor")
    refused = 0
    for case in cases():
        parity = _parity(case, device, CPU_ROWS)
        refused += bool(parity.failures())
        shape = " x ".join(map(str, case.shape))
        kernels = ", ".join(_resources(found, case)) or "triton is not installed"
        print(
            f"{case.name:<40} {shape:<18} {case.moved_bytes / 1e6:>9.1f} "
            f"{case.operations / 1e9:>7.1f} {parity.worst():>7.2f}  {kernels}",
            flush=True,
        )
    return 1 if refused else 0


def _resources(found: list[compile_matrix.Case], case: Case) -> Iterator[str]:
    if importlib.util.find_spec("triton") is None or launch.INTERPRETED:
        return
    variant = "dropout" if "dropout" in case.name else "residual"
    for kernel in case.kernels:
        chosen = [c for c in found if c.kernel == kernel and c.size == case.shape[-1]]
        # not every size has every variant; the first needs most registers
        nearest = [c for c in chosen if c.variant == variant] or chosen
        jobs = compile_matrix.jobs(nearest[:1], False)
        wanted = [
            job
            for job in jobs
            if (job.architecture, job.dtype) == (STATIC_ARCHITECTURE, "bfloat16")
            and ":" not in job.case
        ]
        for row in compile_matrix.run(wanted, 1):
            at_once = programs_at_once(row.registers, row.num_warps, row.shared_bytes)
            yield f"{kernel} {row.registers}, {at_once} of {row.num_warps} warps"


def _parity(case: Case, device: torch.device, rows: int) -> Parity:
    parity = Parity(DTYPE)
    results = []
    for backend, dtype in (("triton", DTYPE), ("reference", DTYPE), ("reference", torch.float64)):
        if device.type == "cpu":
            backend = "reference"
        with ops.use_backend(backend):
            leaves = _leaves(case, rows, dtype, device)
            output = case.operator(**leaves)
            tensors = {"output": output}
            if case.backward:
                output.backward(_flowing(output))
                tensors |= {name: t.grad for name, t in leaves.items() if t.grad is not None}
            results.append(tensors)
    parity.add(*results)
    return parity


def _step(case: Case, backend: str, operator: Callable[..., Tensor]) -> Callable[[], Any]:
    leaves = _leaves(case, ROWS, DTYPE, torch.device("cuda"))
    with ops.use_backend(backend):
        flowing = _flowing(operator(**leaves))
    targets = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def forward() -> Any:
        with ops.use_backend(backend), torch.no_grad():
            return operator(**leaves)

    def both() -> Any:
        with ops.use_backend(backend):
            return torch.autograd.grad(operator(**leaves), targets, flowing)

    return both if case.backward else forward


def _leaves(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    made = {name: t.to(device) for name, t in case.make(rows).items()}
    return {
        # ids stay as they are
        name: t.to(DTYPE).to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in made.items()
    }


def _flowing(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(DTYPE).to(output)


def _norm_inputs(width: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        "x": torch.randn(rows, width),
        "weight": 1 + torch.randn(width) / 8,
        "bias": torch.randn(width),
        "x_bias": torch.randn(width),
        "residual": torch.randn(rows, width),
    }


def _feed_forward_inputs(hidden_size: int, intermediate_size: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        "x": torch.randn(rows, hidden_size),
        "w1": torch.randn(intermediate_size, hidden_size) * hidden_size**-0.5,
        "b1": torch.randn(intermediate_size),
        "w2": torch.randn(hidden_size, intermediate_size) * intermediate_size**-0.5,
    }


@functools.cache
def _rng(device: torch.device) -> Rng:
    # its state is copied to the device once, as in training, not once a call
    return Rng(seed=1, exact=True).on(device)


def _dropped_norm(**tensors: Any) -> Tensor:
    return ops.layer_norm(**tensors, dropout_p=0.1, rng=_rng(tensors["x"].device))


def _embedding_inputs(width: int) -> Callable[[int], Inputs]:
    return lambda rows: {
        # frequent words are very frequent: a cube crowds near zero
        "input_ids": (torch.rand(rows).pow(3) * VOCABULARY).long(),
        "position_ids": torch.arange(rows) % POSITIONS,
        "token_type_ids": torch.arange(rows) % POSITIONS * SEGMENTS // POSITIONS,
        "word_weight": torch.randn(VOCABULARY, width),
        "position_weight": torch.randn(POSITIONS, width),
        "token_type_weight": torch.randn(SEGMENTS, width),
        "norm_weight": 1 + torch.randn(width) / 8,
        "norm_bias": torch.randn(width),
    }


def _embedded(**tensors: Any) -> Tensor:
    return ops.embedding(**tensors, dropout_p=0.1, rng=_rng(tensors["input_ids"].device))


def _liger_norm(**tensors: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore

    # Liger's norm adds nothing: the sum is a pass of its own
    total = tensors["x"] + tensors["x_bias"] + tensors["residual"]
    parameters = tensors["weight"], tensors["bias"]
    normed: Tensor = LigerLayerNormFunction.apply(total, *parameters, 1e-12)
    return normed


def _direction(backward: bool) -> str:
    return ", forward + backward" if backward else ", forward"


def file_name(device: str) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert bench kernels", description=__doc__)
    parser.add_argument("--results", help="folder for one JSON file a device")
    parser.add_argument("--autotune", action="store_true", help="torch.compile max-autotune too")
    return parser
