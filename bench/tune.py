"""`fastbert tune`: measure launch configurations on this GPU and keep the fastest.

Writes the override file that `kernels/launch.py` reads at the next start. A candidate counts only
if its results are those of the default configuration, and replaces it only if it is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastbert.bench import gpu
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.kernels import attention_launch, launch
from fastbert.kernels.attention_launch import HEAD_DIMS
from fastbert.kernels.checks import NO_DRAW
from fastbert.kernels.launch import Launch, Measured
from fastbert.kernels.layout import OWNED_BLOCKS, Layout

ROWS = 16384
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (384, 768, 1024)
# of the embedding and the masked-LM head; 15 % of a batch's tokens are masked
VOCABULARY, POSITIONS, SEGMENTS, MASKED = 30522, 512, 2, 2458
# a smaller gain is noise
LEAST_GAIN = 0.02

Key = tuple[str, str, str, int]
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Subject:
    """A kernel to tune: its launcher's call, and what it competes with besides its default."""

    kernel: str
    size: int
    sample: Tensor
    call: Callable[[], Any]
    rival: Callable[[], Any] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, write the file, print what was gained."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("tune: needs a CUDA or HIP device, torch sees none")
    widths = options.widths or WIDTHS
    subjects = [s for dtype in DTYPES for w in widths for s in subjects_of(w, dtype, "cuda")]
    subjects += [s for dtype in DTYPES for s in _cross_entropy_subjects(dtype, "cuda")]
    for dtype, head_dim in itertools.product(DTYPES[:2], HEAD_DIMS):
        subjects += attention_subjects(head_dim, dtype, "cuda")
    rows = tune(subjects, gpu.time_ms, torch.cuda.get_device_name())
    print(f"{launch.override_path()}: {write(rows)} rows")
    return 0


def tune(subjects: Sequence[Subject], timer: Timer, measured_on: str) -> dict[Key, Measured]:
    """The rows in which a candidate beats the default, and any rival, by more than noise."""
    rows = {}
    bar = tqdm(subjects, unit="kernel", disable=None)
    for subject in bar:
        bar.set_description(f"{subject.kernel} {subject.size}")
        found, before_ms, best_ms = _best(subject, timer)
        name = str(subject.sample.dtype).removeprefix("torch.")
        key = (subject.kernel, launch.architecture(subject.sample.device), name, subject.size)
        if found is not None:
            rows[key] = Measured(found, measured_on)
            bar.write(f"{subject.kernel:<22} {name:<9} {subject.size:>6} {before_ms:.4f} ms ->"
                      f" {best_ms:.4f} ms")  # fmt: skip
    return rows


def write(rows: dict[Key, Measured]) -> int:
    """Add the rows to the override file; returns how many it holds then."""
    everything = {**launch.overrides(), **rows}
    path = launch.override_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [launch.table_entry(key, measured) for key, measured in sorted(everything.items())]
    with atomic_write(path) as file:
        json.dump({"rows": entries}, file, indent=1)
    launch.overrides.cache_clear()
    return len(entries)


def candidates(kernel: str, size: int) -> Iterator[Launch]:
    """Configurations worth a try; the default is among them."""
    if kernel.startswith("attention_"):
        yield from _attention_candidates(kernel, size)
        return
    yield launch.default(kernel, size)
    if kernel.startswith(("layer_norm", "embedding")):
        columns = launch.chunk_columns(size)
        for rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
            for programs in (2, 4, 6, 8) if kernel.endswith("bwd") else (1,):
                for stages in (2, 3) if kernel == "layer_norm_bwd" else (2,):
                    if 128 <= rows * size // warps <= 4096:
                        yield Launch(
                            rows,
                            columns,
                            num_warps=warps,
                            num_stages=stages,
                            programs_per_processor=programs,
                        )
    elif kernel.startswith("bias_activation"):
        tiles = itertools.product((1, 4, 8, 16), (128, 256, 512, 1024), (4, 8))
        for (rows, columns, warps), programs in itertools.product(
            tiles, (4, 8, 12) if kernel.endswith("bwd") else (1,)
        ):
            if columns <= 2 * size and 256 <= rows * columns // warps <= 2048:
                yield Launch(rows, columns, num_warps=warps, programs_per_processor=programs)
    elif kernel == "cross_entropy":
        for columns, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            if columns // warps >= 128:
                yield Launch(1, columns, num_warps=warps)
    elif kernel == "bias_gradient":
        for rows, columns, warps in itertools.product((16, 32, 64), (64, 128, 256), (4, 8)):
            yield Launch(rows, columns, num_warps=warps)
    elif kernel == "run_sums":
        for rows, columns, warps in itertools.product(
            (16, 32, 64, 128), (256, 512, 1024), (1, 2, 4)
        ):
            if columns <= 2 * size:
                yield Launch(rows, columns, num_warps=warps)
    elif kernel == "linear_activation":
        for rows, columns, stages in itertools.product((64, 128), (128, 256), (3, 4)):
            yield Launch(rows, columns, 64, 8, stages, programs_per_processor=1)


def _attention_candidates(kernel: str, head_dim: int) -> Iterator[Launch]:
    default = attention_launch.default(kernel, head_dim, 2)
    if default is not None:
        yield default
    if kernel.startswith("attention_bwd_owned"):
        block = int(kernel.rsplit("_", 1)[1])
        for warps in (4, 8):
            yield Launch(block, block, num_warps=warps, num_stages=1)
        return
    block = int(kernel.rsplit("_", 1)[1]) if "owned" in kernel else 0
    for rows, columns, stages in itertools.product((64, 128), (32, 64, 128), (1, 2, 3)):
        if block in (0, rows):
            yield Launch(rows, columns, num_warps=rows // 16, num_stages=stages)


def attention_subjects(head_dim: int, dtype: torch.dtype, device: str) -> Iterator[Subject]:
    """Attention's kernels at one head size, on sequences of each path's longest length."""
    from fastbert.kernels import attention, attention_backward

    heads = 768 // head_dim
    qkv = torch.randn(ROWS, 3, heads, head_dim, device=device, dtype=dtype)
    query, key, value = qkv.unbind(1)
    dout = torch.randn_like(query)
    for length in (512, *OWNED_BLOCKS):
        bounds = torch.arange(0, ROWS + 1, length, dtype=torch.int32)
        layout = Layout(bounds, ROWS, length).to(device)
        rows, tiles, block = layout.rows(), layout.tiles(), layout.block or 0
        context: dict[str, Any] = {
            "starts": rows.starts,
            "ends": rows.ends,
            "tiles": tiles,
            "block": block,
            "softmax_scale": head_dim**-0.5,
            **dict.fromkeys(("alibi_slopes", "before", "after", "words", "state")),
            **dict.fromkeys(("layer", "site", "dropout_p"), 0),
        }
        end = f"_owned_{block}" if block else ""

        def forward(context: dict[str, Any] = context) -> Any:
            return attention.attention_fwd(query, key, value, **context)

        out, lse = forward()
        behind = {**context, "dout": dout, "dlse": None, "out": out, "lse": lse}

        def backward(context: dict[str, Any] = behind) -> Any:
            return attention_backward.attention_bwd(query=query, key=key, value=value, **context)

        yield Subject(f"attention_fwd{end}", head_dim, qkv, forward)
        for kernel in (f"bwd{end}",) if block else ("bwd_query", "bwd_key"):
            yield Subject(f"attention_{kernel}", head_dim, qkv, backward)


def subjects_of(width: int, dtype: torch.dtype, device: str) -> Iterator[Subject]:
    """Every kernel at one hidden size, the feed-forward ones at four times it."""
    from fastbert.kernels import autograd, feed_forward

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, residual, vector = normal(ROWS, width), normal(ROWS, width), normal(width)
    parts = (x, vector, residual, vector, vector, *NO_DRAW, 1e-12, dtype, False, True)
    y, _, mean, rstd = autograd.layer_norm_fwd(*parts)
    yield Subject("layer_norm_fwd", width, x, lambda: autograd.layer_norm_fwd(*parts))
    back = (y, None, x, vector, residual, vector, mean, rstd, *NO_DRAW, False, True)
    yield Subject("layer_norm_bwd", width, x, lambda: autograd.layer_norm_bwd(*back, dtype, None))
    yield from _embedding_subjects(width, dtype, device)
    wide = 4 * width
    weight, bias = normal(wide, width) * width**-0.5, normal(wide)
    pre = x @ weight.t()
    forward = feed_forward.bias_activation_fwd
    yield Subject("bias_activation_fwd", wide, pre, lambda: forward(pre, bias, "gelu", False))
    yield Subject(
        "bias_activation_bwd",
        wide,
        pre,
        lambda: feed_forward.bias_activation_bwd(pre, pre, bias, "gelu", False),
    )
    yield Subject(
        "linear_activation",
        wide,
        x,
        lambda: feed_forward.linear_activation(x, weight, bias, "gelu", True),
        # the product by the vendor's library with the pass behind it
        lambda: forward(x @ weight.t(), bias, "gelu", False),
    )


def _embedding_subjects(width: int, dtype: torch.dtype, device: str) -> Iterator[Subject]:
    from fastbert.kernels import embedding, keyed_sum

    tables = [
        torch.randn(size, width, device=device, dtype=dtype)
        for size in (VOCABULARY, POSITIONS, SEGMENTS)
    ]
    vector = torch.randn(width, device=device)
    # frequent words are very frequent: a cube crowds near zero
    words = (torch.rand(ROWS, device=device).pow(3) * VOCABULARY).long()
    places = torch.arange(ROWS, device=device) % POSITIONS
    columns = (words, places, places % SEGMENTS, None)
    forward: Any = (*tables, vector, vector, *columns, *NO_DRAW, 1e-12, dtype, True)
    y, mean, rstd = embedding.embedding_fwd(*forward)
    back: Any = (y, *tables, vector, *columns, mean, rstd, *NO_DRAW)
    yield Subject("embedding_fwd", width, y, lambda: embedding.embedding_fwd(*forward))
    yield Subject("embedding_bwd", width, y, lambda: embedding.embedding_bwd(*back))
    if dtype == torch.float32:
        # the sums are fp32 whatever the tables are
        keys = words.int()
        yield Subject("run_sums", width, y, lambda: keyed_sum.sum_by_key(y, keys, VOCABULARY))


def _cross_entropy_subjects(dtype: torch.dtype, device: str) -> Iterator[Subject]:
    from fastbert.kernels import masked_lm

    padded = -(-VOCABULARY // masked_lm.ALIGNMENT) * masked_lm.ALIGNMENT
    logits = torch.randn(MASKED, padded, device=device, dtype=dtype)
    labels = torch.arange(MASKED, device=device)
    losses = torch.empty(MASKED, device=device)
    correct = torch.empty(MASKED, dtype=torch.int32, device=device)
    dbias = torch.empty(VOCABULARY, device=device)

    def cross_entropy() -> tuple[Tensor, Tensor]:
        copy = logits.clone()
        masked_lm.cross_entropy(copy, labels, losses, correct, VOCABULARY, -100, 0.0, 0.0, True)
        return copy, losses.clone()

    def bias_gradient() -> Tensor:
        masked_lm.add_bias_gradient(logits, dbias.zero_())
        return dbias.clone()

    yield Subject("cross_entropy", VOCABULARY, logits, cross_entropy)
    yield Subject("bias_gradient", VOCABULARY, logits, bias_gradient)


def _best(subject: Subject, timer: Timer) -> tuple[Launch | None, float, float]:
    expected = _tensors(subject.call())
    before_ms = timer(subject.rival or subject.call)
    best, best_ms = None, before_ms * (1 - LEAST_GAIN)
    for candidate in dict.fromkeys(candidates(subject.kernel, subject.size)):
        with launch.trying(subject.kernel, candidate):
            try:
                agrees = _agree(_tensors(subject.call()), expected)
                ms = timer(subject.call) if agrees else before_ms
            except Exception as error:  # too large for this card, in whatever words
                tqdm.write(f"{subject.kernel}: {candidate}: {str(error).splitlines()[0]}")
                continue
        if ms < best_ms:
            best, best_ms = candidate, ms
    return best, before_ms, best_ms


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _agree(ours: list[Tensor], expected: list[Tensor]) -> bool:
    # the order of a sum may change with the tile, and with it the last digits
    for mine, theirs in zip(ours, expected, strict=True):
        if theirs.numel():
            difference = (mine.double() - theirs.double()).square().mean().sqrt()
            size = theirs.double().square().mean().sqrt()
            if not bool(difference <= 4 * torch.finfo(theirs.dtype).eps * size):
                return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbert tune", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", help="hidden sizes (384 768 1024)")
    return parser
