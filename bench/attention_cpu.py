"""The reference path's attention on this CPU, beside a loop of torch's own attention.

Sequences in the blocks of kernels/groups.py against one scaled_dot_product_attention a sequence, in
fp32 and bf16, forward and with backward. Who is outside the error rule gets no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.bench import attention_peers
from fastbert.bench.attention_peers import Batch
from fastbert.bench.attention_steps import batch_of, flowing, ours, step_of
from fastbert.bench.parity import Parity
from fastbert.bench.timing import Spread, interleaved_ms, speedup, spread
from fastbert.kernels import ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS, REPEATS = 4096, 9
# uniform lengths, and the two mixtures that BERT meets
LENGTHS = ("32", "128", "512", "16 to 128", "32 to 512")
PARITY_TOKENS = 600


@dataclass(frozen=True)
class Row:
    """Milliseconds of ours and of the loop; `speedup` is the loop's time over ours."""

    lengths: str
    sequences: int
    dtype: str
    direction: str
    parity: float
    refused: bool
    ours_ms: Spread | None = None
    loop_ms: Spread | None = None
    speedup: Spread | None = None

    def line(self) -> str:
        """The row for a terminal."""
        label = f"{self.lengths:<10} {self.dtype} {self.direction:<19}"
        if self.ours_ms is None or self.speedup is None:
            return f"{label} refused: {self.parity:.2f} of the error bound"
        ratio = self.speedup
        return (
            f"{label} {self.ours_ms.median:>8.1f} ms, {ratio.median:.2f} times as fast as a loop "
            f"over {self.sequences} sequences ({ratio.lowest:.2f} to {ratio.highest:.2f})"
        )


def rows(lengths: Mapping[str, list[int]]) -> Iterator[Row]:
    """Every mixture, [name] to its sequences' lengths, in every dtype and direction."""
    for name, sizes in lengths.items():
        for dtype_name, dtype in DTYPES.items():
            batch = batch_of(sizes, sum(sizes), torch.device("cpu"), dtype)
            judged = parity(sizes, dtype)
            refused = bool(judged.failures())
            for forward_only in (True, False):
                direction = "forward" if forward_only else "forward + backward"
                known = (name, len(sizes), dtype_name, direction, judged.worst(), refused)
                yield Row(*known) if refused else _timed(batch, forward_only, known)


def parity(sizes: list[int], dtype: torch.dtype) -> Parity:
    """Ours and the loop against the loop in fp64, on as many sequences as fp64 takes quickly."""
    few = [
        n for place, n in enumerate(sizes) if not place or sum(sizes[: place + 1]) < PARITY_TOKENS
    ]
    results = []
    for provider, width in (
        (ours(0.0), dtype),
        (attention_peers.loop, dtype),
        (attention_peers.loop, torch.float64),
    ):
        # what both sides are given are numbers of the narrower dtype
        batch = batch_of(few, sum(few), torch.device("cpu"), dtype)
        with ops.use_backend("reference"):
            call, leaves = provider(Batch(batch.qkv.to(width), few, batch.layout))
            output = call()
            gradients = torch.autograd.grad(output, leaves, flowing(output))
        results.append({"output": output.detach(), "gradient": _fused(gradients)})
    judged = Parity(dtype)
    judged.add(*results)
    return judged


def _fused(gradients: tuple[Tensor, ...]) -> Tensor:
    """[tokens, 3, heads, head_dim], of query, key and value apart or of the projection."""
    return gradients[0] if len(gradients) == 1 else torch.stack(gradients, dim=1)


def _timed(batch: Batch, forward_only: bool, known: tuple[str, int, str, str, float, bool]) -> Row:
    with ops.use_backend("reference"):
        steps = {
            "ours": step_of(ours(0.0), batch, forward_only),
            "loop": step_of(attention_peers.loop, batch, forward_only),
        }
        times = interleaved_ms(steps, repeats=REPEATS)
    return Row(
        *known,
        ours_ms=spread(times["ours"]),
        loop_ms=spread(times["loop"]),
        speedup=speedup(times["loop"], times["ours"]),
    )
