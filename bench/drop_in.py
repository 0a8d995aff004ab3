"""Other people's models on real text: stock transformers beside the same model accelerated.

1. Paragraphs of the text are tokenised and dealt into padded batches, in the order of the text and
   sorted by length, which is the strongest order for padded batches.
2. Hidden states must agree by the error rule, or the rows of that dtype are refused.
3. Every side takes one pass over the batches, in turn: encode, cross-encoder, fine-tuning.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import machine, peers
from fastbert.bench.drop_in_sides import DTYPES, Side, check_parity, make_sides
from fastbert.bench.drop_in_text import (
    MODEL_PACKAGE,
    ORDERS,
    TASKS,
    TEXT,
    Case,
    default_model,
    default_text,
    padded_batches,
    tokenise,
)
from fastbert.bench.timing import Spread, interleaved_ms, speedup, spread
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.training.loop import has_fast_bf16


def run(
    case: Case,
    model: str,
    text: str,
    *,
    tasks: Sequence[str] = TASKS,
    dtypes: Sequence[str] = tuple(DTYPES),
    compiled: bool = False,
    repeats: int = 3,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check parity, then time.

    Args:
        case: what is computed.
        model: a folder with an encoder of any family and its tokenizer.
        text: a text file.
        tasks: of TASKS.
        dtypes: fp32, bf16.
        compiled: time torch.compile of the stock model as well (minutes of compilation).
        repeats: rounds that count.
        device: None for the GPU where there is one.
        say: told what happens.

    Raises:
        InputError: a model or text that cannot be read, or transformers is not installed.
    """
    peers.transformers()
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences = tokenise(case, model, text)
    result: dict[str, Any] = {
        "bench": "drop-in",
        "machine": machine.describe(device),
        "case": dataclasses.asdict(case) | {"model": Path(model).name, "text": Path(text).name},
        "repeats": repeats,
        "parity": {},
        "tasks": {},
        "notes": _notes(device),
    }
    usable = []
    for dtype in dtypes:
        if dtype == "bf16" and not has_fast_bf16(device):
            result["notes"].append(f"bf16 skipped: this {device.type} has no bf16 matrix units")
            continue
        say(f"parity, {dtype}")
        failures = check_parity(case, model, sequences["encode"], dtype, device, result["parity"])
        if failures:
            result["notes"].append(f"{dtype} refused: {failures[0]}")
        else:
            usable.append(dtype)
    for task in tasks:
        sides = make_sides(task, case, model, sequences[task], usable, compiled, device)
        say(f"timing {task}: {', '.join(side.label for side in sides)}")
        times = interleaved_ms(
            {side.label: side.step for side in sides},
            repeats=repeats,
            warm_up=1,
            synchronise=torch.cuda.synchronize if device.type == "cuda" else lambda: None,
        )
        result["tasks"][task] = _rows(sides, times, sequences[task], case)
    return result


def _notes(device: torch.device) -> list[str]:
    notes = [
        "stock: transformers with sdpa attention; fast: the same model after fastbert.accelerate",
        "encode and cross-encoder: evaluation mode, bf16 is the whole model in bf16; "
        "fine-tune: dropout as configured, bf16 is autocast, AdamW (fused)",
    ]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn") is None:
        notes.append("FlashAttention-2 is not installed: stock runs without its unpadding")
    return notes


def _rows(
    sides: Sequence[Side],
    times: Mapping[str, list[float]],
    sequences: list[list[int]],
    case: Case,
) -> dict[str, Any]:
    tokens = sum(map(len, sequences))
    padded = {
        order: sum(b["input_ids"].numel() for b in padded_batches(sequences, case, 0, order))
        for order in ORDERS
    }
    rows = [
        {
            "name": side.name,
            "dtype": side.dtype,
            "order": side.order,
            "pass_ms": _figures(spread(times[side.label]), 1),
            "real_tokens_per_s": round(1000.0 * tokens / spread(times[side.label]).median),
            "all_pass_ms": [round(value, 1) for value in times[side.label]],
        }
        for side in sides
    ]
    ratios = [
        {
            "ours": ours.label,
            "peer": peer.label,
            "speedup": _figures(speedup(times[peer.label], times[ours.label]), 3),
        }
        for ours in sides
        for peer in sides
        if ours.name == "fast" and peer.name != "fast"
    ]
    return {
        "sequences": len(sequences),
        "real_tokens": tokens,
        "padded_tokens": padded,
        "rows": rows,
        "ratios": ratios,
    }


def _figures(values: Spread, digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in dataclasses.asdict(values).items()}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    host, case = result["machine"], result["case"]
    lines = [
        f"{host['cpu']} ({host['cpu_class']}), {host['threads']} of {host['cores']} threads"
        + (f", {host['gpu']}" if "gpu" in host else ""),
        f"torch {host['torch']}, transformers {host['transformers']}, python {host['python']}, "
        f"commit {host['commit']}",
        f"{case['model']} on {case['paragraphs']} paragraphs of {case['text']}, at most "
        f"{case['longest']} tokens, batches of {case['batch_size']}; {result['repeats']} rounds",
    ]
    for task, found in result["tasks"].items():
        padded = found["padded_tokens"]
        lines += [
            "",
            f"{task}: {found['sequences']} sequences, {found['real_tokens']} real tokens of "
            f"{padded['unsorted']} padded, {padded['sorted']} sorted",
            f"{'':26}{'pass ms':>10}{'min..max':>22}{'real tokens/s':>16}",
        ]
        for row in found["rows"]:
            taken = row["pass_ms"]
            between = f"{taken['lowest']:.0f}..{taken['highest']:.0f}"
            label = f"{row['name']} {row['dtype']} {row['order']}"
            lines.append(
                f"{label:26}{taken['median']:>10.0f}{between:>22}{row['real_tokens_per_s']:>16,}"
            )
        lines += [
            f"  {ratio['ours']} is {ratio['speedup']['median']:.2f}x {ratio['peer']} "
            f"({ratio['speedup']['lowest']:.2f}..{ratio['speedup']['highest']:.2f} by round)"
            for ratio in found["ratios"]
        ]
    checked = [
        f"{dtype} worst at {report['worst_share_of_allowed']:.0%} of what the rule allows"
        for dtype, report in result["parity"].items()
    ]
    return "\n".join([*lines, "", f"parity: {'; '.join(checked)}", *result["notes"]])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str]) -> int:
    """Exit status 1 where a parity check refused rows."""
    parser = argparse.ArgumentParser(prog="fastbert bench drop-in", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help=f"an encoder's folder (the package {MODEL_PACKAGE}'s)")
    parser.add_argument("--text", help=f"a text file ({TEXT} of the data sets)")
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable (all)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable (all)")
    parser.add_argument("--paragraphs", type=_positive, default=256, help="(%(default)s)")
    parser.add_argument("--longest", type=_positive, default=256, help="tokens (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=32, help="(%(default)s)")
    parser.add_argument(
        "--training-batches", type=_positive, default=4, help="of a fine-tuning pass (%(default)s)"
    )
    parser.add_argument("--repeats", type=_positive, default=3, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=2, help="of torch (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="stock under torch.compile as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.parent.is_dir():
        raise InputError(f"--json {given.json}: no such folder {given.json.parent}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    case = Case(given.paragraphs, given.longest, given.batch_size, given.training_batches)
    before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        result = run(
            case,
            given.model or default_model(),
            given.text or default_text(),
            tasks=given.task or TASKS,
            dtypes=given.dtype or tuple(DTYPES),
            compiled=given.compile,
            repeats=given.repeats,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        torch.set_num_threads(before)
    print(table(result))
    if given.json is not None:
        with atomic_write(given.json) as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 1 if any(report["failures"] for report in result["parity"].values()) else 0
