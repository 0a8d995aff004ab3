"""Minutes of real pre-training: English Wikipedia, ours beside transformers, on the same batches.

Every round is one optimiser step of both on the same sequences, masked alike; after them the loss
on held-out text says that both have learned the same. `--repeats` is the number of steps.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fastbert.bench import peers
from fastbert.bench.providers import BF16
from fastbert.bench.public_model import WIKIPEDIA, data_file, default_model
from fastbert.bench.real_training import Ours, Theirs
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.workload import Workload, step_operations
from fastbert.data.corpus import read_documents
from fastbert.data.sentences import split_sentences
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer

LONGEST, LEARNING_RATE, SEED, STEPS = 128, 5e-4, 0, 100
HELD_OUT = 64


def sequences(path: str, tokenizer: Tokenizer, wanted: int) -> list[list[int]]:
    """Sentences of the text, [CLS] and [SEP] around each, cut at `LONGEST`.

    Raises:
        InputError: too little text.
    """
    texts: list[str] = []
    for document in read_documents([path], say=lambda line: None):
        texts += [s for s in split_sentences(document.text) if len(s.split()) >= 4]
        if len(texts) >= wanted:
            break
    if len(texts) < wanted:
        raise InputError(f"{path}: {len(texts)} sentences, {wanted} are wanted")
    order = np.random.default_rng(SEED).permutation(wanted)
    encoded = tokenizer.encode_batch(texts[:wanted], literal=True)
    return [[tokenizer.cls_id, *list(encoded[n])[: LONGEST - 2], tokenizer.sep_id] for n in order]


def masked(ids: Sequence[list[int]], tokenizer: Tokenizer, seed: int) -> Examples:
    """15 % of the words chosen: [MASK] at eight of ten, another word at one, itself at one."""
    rng = np.random.default_rng([SEED, seed])
    examples = Examples.from_lists(ids)
    inner = np.ones(len(examples.input_ids), dtype=bool)
    inner[examples.cu_seqlens[:-1]] = inner[examples.cu_seqlens[1:] - 1] = False
    chosen = np.flatnonzero(inner & (rng.random(len(inner)) < 0.15))
    examples.masked_positions, examples.labels = chosen, examples.input_ids[chosen].copy()
    manner = rng.random(len(chosen))
    examples.input_ids[chosen[manner < 0.8]] = tokenizer.mask_id
    other = chosen[manner >= 0.9]
    examples.input_ids[other] = rng.integers(999, tokenizer.vocab_size, len(other))
    return examples


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One case: so many steps, and the held-out loss after them."""
    path = options.text or data_file(WIKIPEDIA)
    if path is None:
        raise InputError(f"--text: name a text file; {WIKIPEDIA} is not among the data sets")
    tokenizer = Tokenizer.from_pretrained(default_model())
    steps = options.repeats
    ids = sequences(str(path), tokenizer, HELD_OUT + min(steps, 60) * options.sequences)
    held_out = masked(ids[:HELD_OUT], tokenizer, 0)
    starts = range(HELD_OUT, len(ids) - options.sequences + 1, options.sequences)
    batches = [masked(ids[start : start + options.sequences], tokenizer, start) for start in starts]
    workload = Workload(size=options.size, vocab_size=tokenizer.vocab_size)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM.from_config(workload.config(), seed=SEED).save_pretrained(folder)
        for dtype in options.dtype or ["bf16"]:
            needs = ("transformers", *([BF16] if dtype == "bf16" else []))
            parts = (batches, dtype, LEARNING_RATE, device)
            load = functools.partial(BertForMaskedLM.from_pretrained, folder)
            theirs = functools.partial(peers.bert_for_masked_lm, folder, device)
            sides: dict[str, Ours | Theirs] = {
                OURS: Ours(load, *parts),
                "transformers": Theirs(theirs, peers.padded, *parts),
            }
            for name, side in sides.items():
                figures = functools.partial(_held_out, side, held_out)
                found.append(Provider(name, dtype, side.step, None, needs, figures))
        real = round(np.mean([int(part.lengths.sum()) for part in batches]))
        wide = round(np.mean([len(part) * int(part.lengths.max()) for part in batches]))
        operations = np.mean(
            [
                step_operations(workload.config(), b.lengths, int(b.num_masked.sum()))
                for b in batches
            ]
        )
        conditions = {"size": options.size, "sequences": options.sequences, "longest": LONGEST,
                      "learning_rate": LEARNING_RATE, "held_out": HELD_OUT}  # fmt: skip
        note = (
            "tokens and operations are of the mean step; no dropout, so that losses stay together"
        )
        name = f"{options.size}, sentences of Wikipedia, batches of {options.sequences}"
        work = Work(real, wide, float(operations))
        yield Case("pretrain", name, work, found, conditions, [note])


def _held_out(side: Ours | Theirs, examples: Examples) -> dict[str, float]:
    total = count = 0.0
    for logits, part in side.outputs(examples):
        assert part.masked_positions is not None and part.labels is not None
        if logits.ndim == 3:
            # padded: the tokens of the stream lie at the real places
            real = np.arange(logits.shape[1]) < np.asarray(part.lengths)[:, None]
            logits = logits[torch.from_numpy(real).to(logits.device)]
        logits = logits[torch.from_numpy(np.asarray(part.masked_positions)).to(logits.device)]
        labels = torch.from_numpy(np.asarray(part.labels)).to(logits.device)
        total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        count += len(labels)
    return {"held-out loss": round(total / count, 3)}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="mini", help="of the model (%(default)s)")
    parser.add_argument("--sequences", type=positive, default=32, help="a batch (%(default)s)")
    parser.add_argument("--text", help=f"a text file ({WIKIPEDIA} of the data sets)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], action="append", help="(bf16)")


SUITE = Suite("pretrain", __doc__, cases, repeats=STEPS, warm_up=0, add_flags=_add_flags)
main = SUITE.main
