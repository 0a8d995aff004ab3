"""What it costs to get text to the step: preparing beside bare tokenising, batches out of shards.

1. The text is prepared into shards and, in turn, only tokenised (`tokenizers.encode_batch` on all
   cores, of documents that are in memory already): the ratio of the times is the cost of the rest,
   reading, sentences, writing and starting processes. The same in processor time, of this process
   and its children, which a busy machine disturbs less.
2. Batches are taken out of the shards, masking and packing included, laid out as a GPU takes them,
   and thrown away.
3. Packing efficiency: real tokens over the batches' room, of a whole epoch of the copies, which
   are cut anew each: of a text that fills no window, the last batch would count for too much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import machine
from fastbert.bench.timing import interleaved_ms, speedup, spread
from fastbert.data.corpus import read_documents
from fastbert.data.loader import Loader
from fastbert.data.objectives import Objective
from fastbert.data.plan import Planner
from fastbert.data.prepare import BLOCK_CHARACTERS, prepare
from fastbert.data.regions import Part
from fastbert.data.shards import open_folder
from fastbert.data.stream import StreamConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.tokenizer import Tokenizer

# budget, sequence length, objective
CASES = (
    (16384, 128, "mlm"),
    (16384, 512, "mlm"),
    (16384, 512, "mlm+sop"),
    (4096, 128, "mlm"),
    (4096, 128, "mlm+sop"),
    (4096, 512, "mlm"),
)
MOST_PREPARE_RATIO, LEAST_TOKENS_PER_S = 1.3, 1_500_000
LEAST_FULL = {16384: 0.995, 4096: 0.98}


def run(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    cores: int = 2,
    copies: int = 4,
    repeats: int = 5,
    batches: int = 400,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure all three.

    Args:
        sources: text.
        tokenizer: what it is cut with.
        folder: an empty one, for the shards.
        cores: that both sides may use.
        copies: of the text, so that starting up counts for what it does in a corpus.
        repeats: rounds.
        batches: taken in a round.
        say: told what happens.

    Returns:
        What goes into the result file.
    """
    documents = [document.text for document in read_documents(sources, say=lambda line: None)]
    text = folder / "text.jsonl"
    with open(text, "w", encoding="utf-8") as file:
        for document in documents * copies:
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    blocks = list(_blocks(documents * copies))
    shards = folder / "shards"

    def ours() -> None:
        shutil.rmtree(shards, ignore_errors=True)
        prepare([str(text)], tokenizer, shards, workers=cores, say=lambda line: None)

    def bare() -> None:
        for block in blocks:
            tokenizer.backend.encode_batch(block, add_special_tokens=False)

    spent: dict[str, list[float]] = {"bare": [], "ours": []}
    sides = {name: _counted(work, spent[name]) for name, work in (("bare", bare), ("ours", ours))}
    say(f"preparing {text.stat().st_size / 1e6:.0f} MB, {repeats} rounds")
    times = interleaved_ms(sides, repeats=repeats, warm_up=1)
    ratio = speedup(times["ours"], times["bare"])
    cpu_ratio = speedup(spent["ours"][1:], spent["bare"][1:])
    manifest, corpora = open_folder(shards, tokenizer.fingerprint)
    parts = [Part.whole(corpus) for corpus in corpora]
    result: dict[str, Any] = {
        "bench": "loader",
        "machine": machine.describe(torch.device("cpu")),
        "cores": cores,
        "text": {"megabytes": round(text.stat().st_size / 1e6, 1), "tokens": manifest.tokens},
        "prepare": {
            "bare_ms": _rounded(asdict(spread(times["bare"]))),
            "ours_ms": _rounded(asdict(spread(times["ours"]))),
            "ratio": _rounded(asdict(ratio)),
            "cpu_ratio": _rounded(asdict(cpu_ratio)),
            "tokens_per_s": round(1000 * manifest.tokens / statistics.median(times["ours"])),
        },
        "batches": [],
    }
    for budget, length, objective in CASES:
        config = StreamConfig(Objective.parse(objective), budget, length, fixed_shapes=True)
        row: dict[str, Any] = {"budget": budget, "max_seq_len": length, "objective": objective}
        row["full"] = round(_full(Planner(parts, tokenizer, config)), 5)
        for workers in (0, cores):
            say(f"batches of {budget}, sequences of {length}, {objective}, {workers} workers")
            rates = [_rate(parts, tokenizer, config, workers, batches) for _ in range(repeats)]
            row[f"tokens_per_s_{workers}_workers"] = _rounded(asdict(spread([r[0] for r in rates])))
            if not workers:
                row["tokens_per_cpu_s"] = _rounded(asdict(spread([r[1] for r in rates])))
        result["batches"].append(row)
    return result


def _counted(work: Callable[[], None], spent: list[float]) -> Callable[[], None]:
    """`work`, with the processor time it takes appended to `spent`."""

    def run() -> None:
        before = _cpu_s()
        work()
        spent.append(_cpu_s() - before)

    return run


def _cpu_s() -> float:
    """Processor time of this process and of children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _blocks(documents: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for document in documents:
        block.append(document)
        if sum(map(len, block)) >= BLOCK_CHARACTERS:
            yield block
            block = []
    if block:
        yield block


def _full(planner: Planner) -> float:
    tokens = count = 0
    for number in range(planner.windows):
        window = planner.window(0, number)
        tokens += int(window.samples.lengths.sum())
        count += len(window.batches)
    return tokens / (count * planner.config.token_budget)


def _rate(
    parts: Sequence[Part], tokenizer: Tokenizer, config: StreamConfig, workers: int, batches: int
) -> tuple[float, float]:
    """Real tokens a second, and a second of this process, once the first batch is there."""
    with Loader(parts, tokenizer, config, workers=workers) as loader:
        next(loader)
        began, spent = time.perf_counter(), time.process_time()
        tokens = sum(batch.num_tokens for batch, _ in islice(loader, batches))
        return tokens / (time.perf_counter() - began), tokens / (time.process_time() - spent)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


def table(result: dict[str, Any]) -> str:
    """The result as lines for a terminal."""
    prepared = result["prepare"]
    ratio = prepared["ratio"]
    lines = [
        f"{result['machine']['cpu']}, {result['cores']} cores; "
        f"{result['text']['megabytes']} MB, {result['text']['tokens']:,} tokens",
        f"prepare: {ratio['median']:.2f} times bare encode_batch "
        f"({ratio['lowest']:.2f} to {ratio['highest']:.2f} by round; goal at most "
        f"{MOST_PREPARE_RATIO}), {prepared['cpu_ratio']['median']:.2f} times in processor time; "
        f"{prepared['tokens_per_s']:,} tokens/s",
        "  budget  length  objective     full  tokens/s by a thread, a processor second, by workers"
        f" (goal {LEAST_TOKENS_PER_S:,})",
    ]
    for row in result["batches"]:
        rates = [value for name, value in row.items() if name.startswith("tokens_per_")]
        shown = "  ".join(f"{rate['median']:>12,.0f}" for rate in rates)
        lines.append(
            f"  {row['budget']:>6}  {row['max_seq_len']:>6}  {row['objective']:<9}  "
            f"{row['full']:>7.2%}  {shown}"
        )
    return "\n".join([*lines, *(f"missed: {line}" for line in missed(result))])


def missed(result: dict[str, Any]) -> list[str]:
    """The goals that a result does not reach."""
    ratio = result["prepare"]["ratio"]["median"]
    found = [f"prepare costs {ratio:.2f} times bare"] if ratio > MOST_PREPARE_RATIO else []
    for row in result["batches"]:
        case = f"{row['objective']} at {row['budget']}, sequences of {row['max_seq_len']}"
        rates = [rate["median"] for name, rate in row.items() if name.endswith("_workers")]
        if max(rates) < LEAST_TOKENS_PER_S:
            found.append(f"{case}: {max(rates):,.0f} tokens/s")
        if row["full"] < LEAST_FULL.get(row["budget"], 0.0):
            found.append(f"{case}: batches {row['full']:.2%} full")
    return found


def main(arguments: Sequence[str]) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser(prog="python -m fastbert.bench loader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sources", nargs="+", help="text: files, globs or folders")
    parser.add_argument("--tokenizer", required=True, help="folder or file of the vocabulary")
    parser.add_argument("--cores", type=int, default=2, help="that both sides may use (2)")
    parser.add_argument("--copies", type=int, default=4, help="of the text (4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    options = parser.parse_args(arguments)
    for name in ("cores", "copies", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"--json {options.json}: no such folder {options.json.parent}")
    # read once, before the library starts its threads
    os.environ["RAYON_NUM_THREADS"] = str(options.cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            options.sources,
            Tokenizer.from_pretrained(options.tokenizer),
            Path(folder),
            cores=options.cores,
            copies=options.copies,
            repeats=options.repeats,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(table(result))
    if options.json is not None:
        with atomic_write(options.json) as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 0
