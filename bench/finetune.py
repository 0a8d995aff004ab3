"""Fine-tuning on real labels: all-MiniLM-L6-v2 learns TREC-6's questions, ours beside transformers.

Every round is one optimiser step of both on the same batch of questions; after them both are scored
on the test set. `--repeats` is the number of steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench import peers
from fastbert.bench.providers import BF16
from fastbert.bench.public_model import data_file, default_model
from fastbert.bench.real_training import Ours, Theirs, select
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite
from fastbert.bench.workload import layer_operations
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.models import BertForSequenceClassification
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer

TRAIN, TEST = "classification/trec6/TREC.train", "classification/trec6/TREC.test"
BATCH, LEARNING_RATE, SEED, STEPS = 32, 1e-4, 0, 150


def read(name: str, tokenizer: Tokenizer, classes: list[str]) -> Examples:
    """Questions with their coarse class; `classes` grows by those that are new.

    Raises:
        InputError: the data set is not there.
    """
    path = data_file(name)
    if path is None:
        raise InputError(f"bench finetune: no {name} among the data sets (FASTBERT_DATA)")
    texts, labels = [], []
    # the published files are in Latin-1
    for line in path.read_text(encoding="latin-1").splitlines():
        head, _, text = line.partition(" ")
        label = head.partition(":")[0]
        if label not in classes:
            classes.append(label)
        texts.append(text)
        labels.append(classes.index(label))
    ids = [
        [tokenizer.cls_id, *part, tokenizer.sep_id]
        for part in tokenizer.encode_batch(texts, literal=True)
    ]
    return Examples.from_lists(ids, sequence_labels=labels)


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One case: so many steps, and the accuracy after them."""
    folder = options.model or default_model()
    tokenizer = Tokenizer.from_pretrained(folder)
    classes: list[str] = []
    train, test = (read(name, tokenizer, classes) for name in (TRAIN, TEST))
    order = np.random.default_rng(SEED).permutation(len(train))
    batches = [
        select(train, order[start : start + BATCH].tolist())
        for start in range(0, len(train) - BATCH + 1, BATCH)
    ]
    config = dataclasses.replace(
        EncoderConfig.from_pretrained(folder),
        labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    found = []
    with tempfile.TemporaryDirectory() as start:
        # the head that the published model lacks is drawn once, for both
        BertForSequenceClassification.from_pretrained(
            folder, config=config, new_heads=True, seed=SEED
        ).save_pretrained(start)
        for dtype in ["bf16"] if options.quick else ["fp32", "bf16"]:
            needs = ("transformers", *([BF16] if dtype == "bf16" else []))
            load = functools.partial(
                BertForSequenceClassification.from_pretrained, start, config=config
            )
            parts = (batches, dtype, LEARNING_RATE, device)
            sides: dict[str, Ours | Theirs] = {
                OURS: Ours(load, *parts),
                "transformers": Theirs(functools.partial(_theirs, start), padded, *parts),
            }
            for name, side in sides.items():
                figures = functools.partial(_accuracy, side, test)
                found.append(Provider(name, dtype, side.step, None, needs, figures))
        taken = batches[: options.repeats]
        real = round(np.mean([int(part.lengths.sum()) for part in taken]))
        wide = round(np.mean([len(part) * int(part.lengths.max()) for part in taken]))
        operations = 3 * config.num_hidden_layers * layer_operations(config, taken[0].lengths)
        conditions = {"model": "all-MiniLM-L6-v2", "data": "TREC-6", "batch": BATCH,
                      "learning_rate": LEARNING_RATE, "test": len(test)}  # fmt: skip
        note = (
            "tokens and operations are of the mean step; no dropout, so that losses stay together"
        )
        name = f"all-MiniLM-L6-v2 on TREC-6, batches of {BATCH}"
        yield Case("finetune", name, Work(real, wide, operations), found, conditions, [note])


def padded(examples: Examples, device: torch.device) -> dict[str, Tensor]:
    """Questions padded to the longest, as a collator does."""
    lengths = torch.from_numpy(np.asarray(examples.lengths))
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.long)
    ids[real] = torch.from_numpy(np.asarray(examples.input_ids, dtype=np.int64))
    labels = torch.from_numpy(np.asarray(examples.sequence_labels))
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _theirs(folder: str) -> Any:
    package = peers.transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32, local_files_only=True
    )


def _accuracy(side: Ours | Theirs, test: Examples) -> dict[str, float]:
    right = total = 0
    for logits, part in side.outputs(test):
        assert part.sequence_labels is not None
        guessed = logits[: len(part)].argmax(dim=-1).cpu().numpy()
        right += int((guessed == part.sequence_labels).sum())
        total += len(part)
    return {"accuracy %": round(100 * right / total, 1)}


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="an encoder's folder (all-MiniLM-L6-v2)")


SUITE = Suite("finetune", __doc__, cases, repeats=STEPS, warm_up=0, add_flags=_add_flags)
main = SUITE.main
