"""How cost grows as the work grows, ours beside theirs: one training step, one quantity at a time.

Quantities: `padding` (the spread of lengths, at one mean), `length` (64 to 8,192, the tokens of a
batch kept), `batch`, `hidden` and `vocabulary`. Every point is a case of the train-step suite.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from fastbert.bench import memory
from fastbert.bench import step_sides as sides
from fastbert.bench.distributions import Distribution
from fastbert.bench.providers import BF16
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.workload import Workload, masked_examples, step_operations
from fastbert.config import EncoderConfig
from fastbert.models import BertForMaskedLM

QUANTITIES = ("padding", "length", "batch", "hidden", "vocabulary")
# of the sweep over padding: sigma of the log-normal, from equal lengths to very uneven ones
SIGMAS = (0.0, 0.15, 0.3, 0.5, 0.8, 1.2)
MEAN_LENGTH, PADDING_SEQUENCES = 40.0, 32
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTH_TOKENS = 1024
BATCHES = (4, 16, 64, 256)
HIDDEN = (128, 256, 512)
VOCABULARIES = (4096, 16384, 30522, 65536)
QUICK_POINTS = 2
# of transformers' step, by padded token and word: logits, their log-softmax and both gradients
LOGIT_BYTES = 16


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """The points of the chosen quantities."""
    for quantity in options.quantity or (QUANTITIES[:1] if options.quick else QUANTITIES):
        points = [point for point in _points(quantity) if point[0] <= options.most]
        if options.quick:
            points = [points[0], points[-1]][:QUICK_POINTS]
        for value, lengths, config in points:
            with tempfile.TemporaryDirectory() as folder:
                BertForMaskedLM.from_config(config, seed=0).save_pretrained(folder)
                yield _case(quantity, value, lengths, config, folder, device, options)


def _points(quantity: str) -> Iterator[tuple[float, np.ndarray, EncoderConfig]]:
    """The value, the lengths, and the model of each point."""
    standard = Workload()
    config = standard.config()
    if quantity == "padding":
        for sigma in SIGMAS:
            drawn = Distribution(MEAN_LENGTH, sigma, 5, 512)
            if sigma:
                lengths = drawn.lengths(PADDING_SEQUENCES)
            else:
                lengths = np.full(PADDING_SEQUENCES, int(MEAN_LENGTH), dtype=np.int64)
            share = 1 - lengths.sum() / (len(lengths) * lengths.max())
            yield round(100 * float(share), 1), lengths, config
    elif quantity == "length":
        for length in LENGTHS:
            # half of the sequences at full length, half at half of it: a third of padding
            count = max(2, LENGTH_TOKENS // length)
            lengths = np.where(np.arange(count) % 2, length, length // 2).astype(np.int64)
            wide = dataclasses.replace(standard, longest=length)
            yield length, lengths, wide.config()
    elif quantity == "batch":
        for count in BATCHES:
            yield count, dataclasses.replace(standard, sequences=count).drawn(), config
    elif quantity == "hidden":
        for hidden in HIDDEN:
            sized = EncoderConfig(
                vocab_size=standard.vocab_size,
                hidden_size=hidden,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=hidden // 64,
                intermediate_size=4 * hidden,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            yield hidden, standard.drawn(), sized
    else:
        for size in VOCABULARIES:
            sized_words = dataclasses.replace(standard, vocab_size=size)
            yield size, standard.drawn(), sized_words.config()


def _case(
    quantity: str,
    value: float,
    lengths: np.ndarray,
    config: EncoderConfig,
    folder: str,
    device: torch.device,
    options: argparse.Namespace,
) -> Case:
    examples = masked_examples(lengths, config.vocab_size, Workload().mask_probability)
    workload = Workload(vocab_size=config.vocab_size, longest=config.max_position_embeddings)
    found = []
    padded_tokens = len(lengths) * int(lengths.max())
    absent = memory.too_little(LOGIT_BYTES * padded_tokens * config.vocab_size, device)
    for dtype in options.dtype or ("bf16",):
        needs = ("transformers", *([BF16] if dtype == "bf16" else []))
        judge = sides.Judge(workload, folder, dtype, device, batches=1)
        found += [
            Provider(OURS, dtype, sides.ours(folder, examples, dtype, device), judge.ours, needs),
            Provider(
                "transformers",
                dtype,
                sides.padded(folder, examples, dtype, device),
                None,
                needs,
                absent=absent,
            ),
        ]
    masked = int(examples.num_masked.sum())
    work = Work(
        int(lengths.sum()),
        padded_tokens,
        step_operations(config, lengths, masked),
    )
    conditions = {
        "quantity": quantity,
        "value": value,
        "sequences": len(lengths),
        "longest": int(lengths.max()),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }
    return Case("sweep", f"{quantity} {value:g}", work, found, conditions)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantity", choices=QUANTITIES, action="append", help="repeatable (all)")
    parser.add_argument("--dtype", choices=sides.DTYPES, action="append", help="(bf16)")
    parser.add_argument(
        "--most", type=positive, default=1 << 20, help="leave out points beyond this value"
    )


SUITE = Suite("sweep", __doc__, cases, repeats=3, warm_up=1, add_flags=_add_flags)
main = SUITE.main
