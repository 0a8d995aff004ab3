"""Every kernel compiled ahead of time for every architecture, without a GPU.

A launcher is called with meta tensors and its launch is recorded: what is compiled here is what a
real call compiles. Gates: no register spills, shared memory within the architecture's limit and,
for fp16 and bf16 matrix kernels, a tensor-core instruction. Results are cached by source hash.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import launch

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """Limits of a GPU generation.

    Attributes:
        name: as in the launch table.
        shared_kib: shared memory one program may use.
        cards: what carries it.
        instruction: the tensor-core instruction that fp16 and bf16 products must contain.
    """

    name: str
    shared_kib: int
    cards: str
    instruction: str


ARCHITECTURES = (
    Architecture("sm_75", 64, "T4, RTX 20", "mma.sync"),
    Architecture("sm_80", 163, "A100", "mma.sync"),
    Architecture("sm_86", 99, "RTX 30, A10", "mma.sync"),
    Architecture("sm_89", 99, "RTX 40, L4", "mma.sync"),
    Architecture("sm_90", 227, "H100, H200", "wgmma"),
    Architecture("sm_100", 227, "B200", "tcgen05.mma"),
    Architecture("sm_120", 99, "RTX 50", "mma.sync"),
    Architecture("gfx942", 64, "MI300", "v_mfma"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# the first tensor cores know no bf16, and Triton (3.6, 3.7) reaches none of them: products run on
# the ordinary units, as those of fp32, and the launch table names such a kernel only where it was
# measured faster
NO_TENSOR_CORE = {("sm_75", "bfloat16"), ("sm_75", "float16")}
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
# kernels of matrix products, and how many each block of the tile walk may take: a product more is
# as much time more
MATRIX_KERNELS = {
    "linear_activation": 1,
    "attention_fwd": 2,
    "attention_bwd_query": 3,
    "attention_bwd_key": 4,
    "attention_bwd_owned": 5,
}
SAFE_SHARED_KIB = 64

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Case:
    """A launcher's call on meta tensors, named kernel/variant/size."""

    kernel: str
    variant: str
    size: int
    call: Callable[[torch.dtype], Any]
    quick: bool = False


@dataclass(frozen=True)
class Job:
    """One compilation, ready for another process: kernel by module and name."""

    case: str
    dtype: str
    architecture: str
    products: int
    module: str
    function: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[int, list[list[Any]]]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Row:
    """What the compiler made of one job.

    Attributes:
        registers: a thread.
        spill_bytes: a thread, registers that went to memory.
        shared_bytes: a program.
        instruction: the tensor-core instruction found, or "".
        products: matrix products in the loop body, or outside, that has most.
        failures: gates not passed; empty where all is well.
    """

    case: str
    dtype: str
    architecture: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instruction: str
    products: int
    failures: tuple[str, ...]


def jobs(cases: list[Case], quick: bool) -> list[Job]:
    """Every distinct compilation of the cases; `quick` as in DESIGN: bf16 everywhere, all on sm_90.

    Raises:
        ValueError: this process runs kernels in the interpreter.
    """
    if launch.INTERPRETED:
        raise ValueError("validate --compile: TRITON_INTERPRET=1 replaces what is to be compiled")
    found: dict[str, Job] = {}
    for architecture in ARCHITECTURES:
        for case in cases:
            for dtype in DTYPES:
                partial = dtype == torch.bfloat16 or architecture.name == "sm_90"
                if quick and not (case.quick and partial):
                    continue
                with launch.assume_architecture(architecture.name), launch.recording() as calls:
                    case.call(dtype)
                for call in calls:
                    job = _job(case, dtype, architecture.name, call)
                    found.setdefault(_identity(job), job)
    return list(found.values())


def run(todo: list[Job], processes: int | None = None, cache: Path | None = None) -> Iterator[Row]:
    """Compile the jobs in parallel; rows come as they are done.

    Args:
        todo: from `jobs`.
        processes: as many as there are processors where None.
        cache: folder of earlier rows; the user's cache folder where None.
    """
    folder = cache or launch.override_path().parent / "compile_matrix"
    folder.mkdir(parents=True, exist_ok=True)
    pending = []
    for job in todo:
        kept = folder / f"{_key(job)}.json"
        if kept.is_file():
            entry = json.loads(kept.read_text())
            # the same code may serve several cases
            yield _judged(Row(**{**entry, "case": job.case, "failures": ()}), job)
        else:
            pending.append((job, kept))
    if not pending:
        return
    processes = processes or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(compile_job, job): (job, kept) for job, kept in pending}
        for future in concurrent.futures.as_completed(waiting):
            job, kept = waiting[future]
            row = future.result()
            if row.failures:
                yield row
                continue
            _keep(kept, row)
            yield _judged(row, job)


def compile_job(job: Job) -> Row:
    """Compile one kernel and read what the compiler reports; no gate is applied yet."""
    try:
        return _compiled(job)
    except Exception as error:  # whatever a compiler may raise is one failing row
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        launched = (job.num_warps, job.num_stages)
        failure = f"does not compile: {reason}"
        return Row(job.case, job.dtype, job.architecture, *launched, 0, 0, 0, "", 0, (failure,))


def _compiled(job: Job) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        _kernel(job),
        dict(job.signature),
        dict(job.constants),
        {(index,): attributes for index, attributes in job.attributes.items()},
    )
    if job.architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(job.architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", job.architecture, 64)
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spill_bytes = _nvidia_resources(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spill_bytes = _amd_resources(assembly)
    instruction = next((name for name in INSTRUCTIONS if name in assembly), "")
    return Row(
        job.case,
        job.dtype,
        job.architecture,
        job.num_warps,
        job.num_stages,
        registers,
        spill_bytes,
        compiled.metadata.shared,
        instruction,
        products_in(compiled.asm["ttir"]),
        (),
    )


def products_in(ttir: str) -> int:
    """The most matrix products in any one region, a loop's body or what lies outside loops."""
    most, open_regions = 0, [0]
    for line in (line.strip() for line in ttir.splitlines()):
        if line.startswith("}") and len(open_regions) > 1:
            most = max(most, open_regions.pop())
        open_regions[-1] += "= tt.dot " in line
        if line.endswith("{"):
            open_regions.append(0)
    return max(most, *open_regions)


def table(rows: list[Row]) -> str:
    """One line a compilation: resources, instruction, verdict."""
    lines = [
        f"{'kernel':<44} {'dtype':<9} {'arch':<7} {'warps':>5} {'stages':>6} {'regs':>5} "
        f"{'spill':>6} {'shared':>8} instruction"
    ]
    for row in sorted(rows, key=lambda r: (r.case, r.dtype, r.architecture)):
        verdict = "  FAIL: " + "; ".join(row.failures) if row.failures else ""
        lines.append(
            f"{row.case:<44} {row.dtype:<9} {row.architecture:<7} {row.num_warps:>5} "
            f"{row.num_stages:>6} {row.registers:>5} {row.spill_bytes:>6} "
            f"{row.shared_bytes / KIB:>7.1f}K {row.instruction}{verdict}"
        )
    return "\n".join(lines)


def _judged(row: Row, job: Job) -> Row:
    architecture = next(a for a in ARCHITECTURES if a.name == row.architecture)
    failures = []
    ordinary = row.dtype == "float32" or (row.architecture, row.dtype) in NO_TENSOR_CORE
    exempt = bool(job.products) and ordinary
    if row.spill_bytes and not exempt:
        failures.append(f"spills {row.spill_bytes} bytes a thread")
    if row.shared_bytes > architecture.shared_kib * KIB:
        failures.append(
            f"shared memory {row.shared_bytes / KIB:.1f} KiB, limit {architecture.shared_kib}"
        )
    if row.products != job.products:
        failures.append(f"{row.products} matrix products, {job.products} are enough")
    if job.products and not exempt and row.instruction != architecture.instruction:
        failures.append(f"no {architecture.instruction} instruction")
    return Row(**{**asdict(row), "failures": tuple(failures)})


def _job(case: Case, dtype: torch.dtype, architecture: str, call: launch.Recorded) -> Job:
    kernel = call.kernel
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, call.arguments, strict=False)):
        specialised = not kernel.params[index].do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[index] = [["tt.divisibility", 16]]
        elif value is None or (specialised and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32"
            if specialised and value % 16 == 0:
                attributes[index] = [["tt.divisibility", 16]]
    for name, value in call.constants.items():
        signature[name] = "constexpr"
        constants[name] = value
    function = kernel.fn.__name__
    part = function.removeprefix("_").removesuffix("_kernel")
    label = f"{case.kernel}/{case.variant}/{case.size}"
    return Job(
        label if part == case.kernel else f"{label}:{part}",
        str(call.arguments[0].dtype).removeprefix("torch."),
        architecture,
        MATRIX_KERNELS.get(part, 0),
        kernel.fn.__module__,
        function,
        signature,
        constants,
        attributes,
        call.launch.num_warps,
        call.launch.num_stages,
    )


def _kernel(job: Job) -> Any:
    import importlib

    return getattr(importlib.import_module(job.module), job.function)


def _identity(job: Job) -> str:
    fields = asdict(job)
    del fields["case"]
    return json.dumps(fields, sort_keys=True, default=str)


def _key(job: Job) -> str:
    import triton

    parts = (triton.__version__, _kernel(job).cache_key, _identity(job), "2")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _keep(path: Path, row: Row) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(row), file)
    os.replace(temporary, path)


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    # a Triton kernel has no local arrays: its stack holds spilled registers
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
