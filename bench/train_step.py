"""One optimiser step on sequences of uneven length: packed by us, padded by transformers.

1. Both sides load the same weights; no dropout.
2. Loss and gradients must agree by the error rule, or the rows of that dtype are refused.
3. Steps are taken in turn: forward, backward, clipping, AdamW (fused), gradients dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.bench import machine, peers
from fastbert.bench.parity import Parity
from fastbert.bench.timing import Spread, interleaved_ms, speedup, spread
from fastbert.config import EncoderConfig
from fastbert.data.stream import MASKED_STEP, SEQUENCE_STEP
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertForMaskedLM, Model
from fastbert.packing import Capacity, Examples, PackedBatch
from fastbert.training.loop import accumulate, autocast, has_fast_bf16
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import TrainingStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 999
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, CLIP_NORM = 1e-4, 0.01, (0.9, 0.98), 1e-8, 1.0
# parity is judged on this many small batches pooled, since fp64 on the whole one takes long
PARITY_BATCHES, PARITY_SEQUENCES = 5, 4


@dataclass(frozen=True)
class Case:
    """What both sides compute."""

    size: str = "mini"
    vocab_size: int = 30522
    sequences: int = 32
    # of the log-normal, before the cap
    mean_length: float = 41.0
    sigma: float = 0.7
    shortest: int = 5
    longest: int = 128
    mask_probability: float = 0.15
    seed: int = 0

    def lengths(self) -> np.ndarray:
        """[sequences] int64: evenly spaced quantiles, so that no lucky draw decides; shuffled."""
        mu = math.log(self.mean_length) - self.sigma**2 / 2
        normal = statistics.NormalDist(mu, self.sigma)
        levels = (np.arange(self.sequences) + 0.5) / self.sequences
        drawn = np.exp([normal.inv_cdf(level) for level in levels])
        lengths = np.clip(np.rint(drawn), self.shortest, self.longest).astype(np.int64)
        return np.random.default_rng(self.seed).permutation(lengths)

    def examples(self) -> Examples:
        """[CLS] words [SEP], words drawn evenly; [MASK] at every chosen place."""
        rng = np.random.default_rng([self.seed, 1])
        lengths = self.lengths()
        first_word = min(FIRST_WORD, self.vocab_size // 2)
        ids, positions, start = [], [], 0
        for length in lengths:
            words = rng.integers(first_word, self.vocab_size, length - 2)
            ids.append([CLS, *words.tolist(), SEP])
            count = max(1, round(self.mask_probability * (length - 2)))
            positions += sorted((start + 1 + rng.permutation(length - 2)[:count]).tolist())
            start += length
        examples = Examples.from_lists(ids)
        examples.masked_positions = np.asarray(positions, dtype=np.int64)
        examples.labels = examples.input_ids[positions]
        examples.input_ids[positions] = MASK
        return examples


@dataclass
class Side:
    """One program in one dtype, ready to step."""

    name: str
    dtype: str
    step: Callable[[], object]

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"


def packed(examples: Examples, chosen: np.ndarray | None = None) -> PackedBatch:
    """A micro-batch with the slots the pre-training stream gives it: sequences and masked rows
    rounded up. The stream is full to about 99.5 %; here it holds the real tokens and no tail."""
    chosen = np.arange(len(examples)) if chosen is None else chosen
    masked = int(examples.num_masked[chosen].sum())
    capacity = Capacity(
        tokens=int(examples.lengths[chosen].sum()),
        sequences=-(-len(chosen) // SEQUENCE_STEP) * SEQUENCE_STEP,
        masked=-(-masked // MASKED_STEP) * MASKED_STEP,
    )
    return examples.batch(chosen, capacity)


def run(
    case: Case,
    *,
    repeats: int = 9,
    warm_up: int = 2,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check parity, then time.

    Args:
        case: what is computed.
        repeats: rounds that count.
        warm_up: rounds before them.
        device: None for the GPU where there is one.
        say: told what happens.

    Returns:
        What goes into the result file: machine, case, parity, rows, ratios, notes.

    Raises:
        InputError: transformers is not installed.
    """
    peers.transformers()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = case.examples()
    batch, padded = packed(examples), peers.padded(examples, device)
    result: dict[str, Any] = {
        "bench": "train-step",
        "machine": machine.describe(device),
        "case": dataclasses.asdict(case) | _shape(batch, padded),
        "repeats": repeats,
        "parity": {},
        "rows": [],
        "ratios": [],
        "notes": _notes(),
    }
    sides: list[Side] = []
    with tempfile.TemporaryDirectory() as folder:
        model = BertForMaskedLM.from_config(_config(case), seed=case.seed)
        model.save_pretrained(folder)
        for dtype in DTYPES:
            if dtype == "bf16" and not has_fast_bf16(device):
                result["notes"].append(f"bf16 skipped: this {device.type} has no bf16 matrix units")
                continue
            say(f"parity, {dtype}")
            failures = _parity(case, folder, dtype, device, result["parity"])
            if failures:
                more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
                result["notes"].append(f"{dtype} refused: {failures[0]}{more}")
                continue
            sides.append(_ours(folder, batch, dtype, device))
            sides.append(_theirs(folder, padded, dtype, device))
        peaks = {side.label: _peak(side, device) for side in sides}
        say(f"timing {', '.join(side.label for side in sides)}: {repeats} rounds")
        times = interleaved_ms(
            {side.label: side.step for side in sides},
            repeats=repeats,
            warm_up=warm_up,
            synchronise=_synchronise(device),
        )
    for side in sides:
        result["rows"].append(_row(side, times[side.label], peaks[side.label], batch.num_tokens))
    result["ratios"] = _ratios(times)
    return result


def _config(case: Case) -> EncoderConfig:
    return EncoderConfig.named(
        case.size,
        vocab_size=case.vocab_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _shape(batch: PackedBatch, padded: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "real_tokens": batch.num_tokens,
        "masked_tokens": batch.num_masked,
        "packed_tokens": batch.capacity,
        "padded_tokens": padded["input_ids"].numel(),
        "padded_shape": list(padded["input_ids"].shape),
    }


def _notes() -> list[str]:
    return [
        "transformers: BertForMaskedLM, sdpa, the batch padded to its longest sequence as its "
        "default collator does; not sorted by length, which one batch cannot be",
        "ours: the trainer's TrainingStep on one packed micro-batch with the stream's slots; the "
        "last layer computes the masked rows alone; the attention plan is made anew in every step",
    ]


def _ours(folder: str, batch: PackedBatch, dtype: str, device: torch.device) -> Side:
    model = BertForMaskedLM.from_pretrained(folder).to(device).train()
    optimizers = Optimizers(
        model, "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta2=BETAS[1]
    )

    step = TrainingStep(model, optimizers, DTYPES[dtype], CLIP_NORM)

    def take() -> None:
        # a batch object of its own, so that its layout is worked out as for a fresh batch
        step([dataclasses.replace(batch)], None, 1.0)

    return Side("fastbert", dtype, take)


def _theirs(folder: str, padded: dict[str, Tensor], dtype: str, device: torch.device) -> Side:
    model = peers.bert_for_masked_lm(folder, device)
    groups = peers.parameter_groups(model, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    def step() -> None:
        with autocast(device, DTYPES[dtype]):
            loss = model(**padded).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Side("transformers", dtype, step)


def _parity(
    case: Case, folder: str, dtype: str, device: torch.device, report: dict[str, Any]
) -> list[str]:
    """Lines of what is outside the rule, over `PARITY_BATCHES` batches of the case's kind."""
    model = BertForMaskedLM.from_pretrained(folder).to(device)
    peer = peers.bert_for_masked_lm(folder, device)
    oracle = peers.bert_for_masked_lm(folder, device).double()
    parity = Parity(DTYPES[dtype])
    for seed in range(PARITY_BATCHES):
        small = dataclasses.replace(
            case, sequences=PARITY_SEQUENCES, seed=case.seed + seed, longest=case.longest // 2
        )
        examples = small.examples()
        padded = peers.padded(examples, device)
        result = accumulate(model, [packed(examples)], device=device, dtype=DTYPES[dtype])
        ours = {"loss": result.sums["masked_lm_loss"] / result.targets.masked}
        ours |= {name: _taken_gradient(p) for name, p in model.named_parameters()}
        parity.add(
            ours,
            _peer_tensors(peer, model, padded, autocast(device, DTYPES[dtype])),
            _peer_tensors(oracle, model, padded, contextlib.nullcontext()),
        )
    failures, beside_peer = parity.failures(), parity.beside_peer()
    report[dtype] = {
        "tensors": len(parity),
        "batches": PARITY_BATCHES,
        "failures": failures,
        "worst_share_of_allowed": round(parity.worst(), 3),
        "rms_error_beside_peer": {
            "median": round(statistics.median(beside_peer), 3),
            "highest": round(beside_peer[-1], 3),
        },
    }
    return failures


def _peer_tensors(
    peer: nn.Module,
    model: Model,
    padded: dict[str, Tensor],
    precision: contextlib.AbstractContextManager[Any],
) -> dict[str, Tensor]:
    with precision:
        loss = peer(**padded).loss
    loss.backward()
    tensors = {"loss": loss.detach(), **peers.gradients_by_our_names(peer, model)}
    peer.zero_grad(set_to_none=True)
    return tensors


def _taken_gradient(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient


def _peak(side: Side, device: torch.device) -> float | None:
    """GiB of the whole process during one step, all sides' weights and moments included."""
    side.step()
    if not machine.reset_peak(device):
        return None
    side.step()
    return machine.peak_gib(device)


def _synchronise(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _row(side: Side, times_ms: list[float], peak: float | None, tokens: int) -> dict[str, Any]:
    taken = spread(times_ms)
    return {
        "name": side.name,
        "dtype": side.dtype,
        "step_ms": _figures(taken, 2),
        "real_tokens_per_s": round(1000.0 * tokens / taken.median),
        "process_peak_gib": None if peak is None else round(peak, 3),
        "all_step_ms": [round(time_ms, 2) for time_ms in times_ms],
    }


def _ratios(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    pairs = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
    return [
        {
            "ours": f"fastbert {own}",
            "peer": f"transformers {other}",
            "speedup": _figures(
                speedup(times[f"transformers {other}"], times[f"fastbert {own}"]), 3
            ),
        }
        for own, other in pairs
        if f"fastbert {own}" in times and f"transformers {other}" in times
    ]


def _figures(values: Spread, digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in dataclasses.asdict(values).items()}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    case, host = result["case"], result["machine"]
    lines = [
        f"{host['cpu']} ({host['cpu_class']}, family {host['cpu_family']}), "
        f"{host['threads']} of {host['cores']} threads"
        + (f", {host['gpu']}" if "gpu" in host else ""),
        f"torch {host['torch']}, transformers {host['transformers']}, python {host['python']}, "
        f"commit {host['commit']}",
        f"{case['size']}, vocabulary {case['vocab_size']}, {case['sequences']} sequences, "
        f"{case['real_tokens']} real tokens of {case['padded_tokens']} padded, "
        f"{case['masked_tokens']} masked; {result['repeats']} rounds",
        "",
        f"{'':20}{'step ms':>10}{'min..max':>20}{'real tokens/s':>16}{'process GiB':>13}",
    ]
    for row in result["rows"]:
        step, peak = row["step_ms"], row["process_peak_gib"]
        between = f"{step['lowest']:.1f}..{step['highest']:.1f}"
        lines.append(
            f"{row['name'] + ' ' + row['dtype']:20}{step['median']:>10.1f}{between:>20}"
            f"{row['real_tokens_per_s']:>16,}{'-' if peak is None else f'{peak:.2f}':>13}"
        )
    lines.append("")
    for ratio in result["ratios"]:
        times = ratio["speedup"]
        lines.append(
            f"{ratio['ours']} is {times['median']:.2f}x {ratio['peer']} "
            f"({times['lowest']:.2f}..{times['highest']:.2f} by round)"
        )
    checked = [
        f"{dtype} {report['tensors']} tensors, worst at {report['worst_share_of_allowed']:.0%} of "
        f"what the rule allows, rms error {report['rms_error_beside_peer']['median']:.2f}x the "
        "peer's"
        for dtype, report in result["parity"].items()
    ]
    return "\n".join([*lines, f"parity: {'; '.join(checked)}", *result["notes"]])


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a parity check refused rows."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbert.bench train-step", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    parser.add_argument("--repeats", type=_positive, default=9, help="rounds that count (9)")
    parser.add_argument("--threads", type=_positive, default=2, help="of torch (2)")
    parser.add_argument("--quick", action="store_true", help="3 rounds; a look, not a result")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder {options.json.parent}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _threads(options.threads):
        result = run(
            Case(),
            repeats=3 if options.quick else options.repeats,
            warm_up=1 if options.quick else 2,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(table(result))
    if options.json is not None:
        with atomic_write(options.json) as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 1 if any(report["failures"] for report in result["parity"].values()) else 0
