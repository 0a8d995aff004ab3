"""What each technique buys: the training step whole, and with one technique switched off at a time.

- packing: every sequence is as long as the longest, and its padding is computed like text
- masked-rows head: logits of every position are made, as transformers makes them
- last-layer rows: the last layer computes every row; the head still takes the masked ones
- fused operators: LayerNorm with its sum, the feed-forward block and the embedding as plain PyTorch
- grouped attention: a call of scaled_dot_product_attention a sequence
- CUDA graph: the step is launched operator by operator (on a GPU)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import encoder
from fastbert.bench import step_sides as sides
from fastbert.bench.operators import plain_embedding, plain_feed_forward, plain_norm
from fastbert.bench.providers import BF16, GPU
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite
from fastbert.bench.timing import Step
from fastbert.bench.workload import Workload, packed, step_operations
from fastbert.kernels import ops
from fastbert.models import BertForMaskedLM
from fastbert.packing import IGNORE_INDEX, Examples, PackedBatch
from fastbert.training.optimizer import Optimizers
from fastbert.training.step import CapturedStep, TrainingStep

Context = Callable[[], AbstractContextManager[Any]]


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One case: the standard training step."""
    workload = Workload()
    examples = workload.examples()
    with tempfile.TemporaryDirectory() as folder:
        BertForMaskedLM.from_config(workload.config(), seed=0).save_pretrained(folder)
        found = []
        for dtype in ["bf16"] if options.quick else list(sides.DTYPES):
            needs = ("transformers", *([BF16] if dtype == "bf16" else []))
            judge = sides.Judge(workload, folder, dtype, device, batches=2)
            step = functools.partial(_step, folder, dtype, device)
            whole = packed(examples)
            found.append(Provider(OURS, dtype, functools.partial(step, whole), judge.ours, needs))
            variants: dict[str, tuple[PackedBatch, Context]] = {
                "packing": (packed(filled(examples)), contextlib.nullcontext),
                "masked-rows head": (every_position(whole), contextlib.nullcontext),
                "last-layer rows": (whole, _all_rows),
                "fused operators": (whole, _plain_operators),
                "grouped attention": (whole, _attention_by_sequence),
            }
            for name, (batch, off) in variants.items():
                make = functools.partial(step, batch, off)
                found.append(Provider(f"without {name}", dtype, make, None, needs))
            eager = functools.partial(step, whole, captured=False)
            found.append(Provider("without CUDA graph", dtype, eager, None, (*needs, GPU)))
        lengths, masked = examples.lengths, int(examples.num_masked.sum())
        padded = len(examples) * int(lengths.max())
        operations = step_operations(workload.config(), lengths, masked)
        work = Work(int(lengths.sum()), padded, operations)
        conditions = dataclasses.asdict(workload)
        name = f"{workload.size}, {workload.sequences} x {workload.lengths}"
        yield Case("ablation", name, work, found, conditions)


def filled(examples: Examples) -> Examples:
    """Every sequence as long as the longest: what packing saves is computed."""
    lengths, longest = examples.lengths, int(examples.lengths.max())
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    real = np.arange(longest) < lengths[:, None]
    ids[real] = examples.input_ids
    assert examples.masked_positions is not None
    made = Examples.from_lists(ids.tolist())
    owner = np.searchsorted(examples.cu_seqlens, examples.masked_positions, side="right") - 1
    places = examples.masked_positions - examples.cu_seqlens[owner]
    made.masked_positions, made.labels = owner * longest + places, examples.labels
    return made


def every_position(batch: PackedBatch) -> PackedBatch:
    """The same batch with all tokens shown to the head, labels at the masked ones alone."""
    assert batch.masked_positions is not None and batch.labels is not None
    labels = torch.full((batch.capacity,), IGNORE_INDEX, dtype=batch.labels.dtype)
    real = batch.labels != IGNORE_INDEX
    labels[batch.masked_positions[real].long()] = batch.labels[real]
    positions = torch.arange(batch.capacity, dtype=batch.masked_positions.dtype)
    return dataclasses.replace(batch, masked_positions=positions, labels=labels)


def _step(
    folder: str,
    dtype: str,
    device: torch.device,
    batch: PackedBatch,
    off: Context = contextlib.nullcontext,
    *,
    captured: bool = True,
) -> Step:
    model = BertForMaskedLM.from_pretrained(folder).to(device).train()
    optimizers = Optimizers(
        model,
        "adamw",
        learning_rate=sides.LEARNING_RATE,
        weight_decay=sides.WEIGHT_DECAY,
        beta2=sides.BETAS[1],
    )
    eager = TrainingStep(model, optimizers, sides.DTYPES[dtype], sides.CLIP_NORM)
    step = CapturedStep(eager) if captured and device.type == "cuda" else eager

    def take() -> None:
        with off():
            step([dataclasses.replace(batch)], None, 1.0)

    return take


def _all_rows() -> AbstractContextManager[Any]:
    return mock.patch.object(encoder, "MOST_SELECTED", -1.0)


@contextlib.contextmanager
def _plain_operators() -> Iterator[None]:
    with (
        mock.patch.object(ops, "layer_norm", plain_norm),
        mock.patch.object(ops, "feed_forward", plain_feed_forward),
        mock.patch.object(ops, "embedding", plain_embedding),
    ):
        yield


def _attention_by_sequence() -> AbstractContextManager[Any]:
    return mock.patch.object(ops, "fused_qkv_attention", attention_by_sequence)


def attention_by_sequence(qkv: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """[tokens, heads, head_dim] of the fused projection, a call of torch's attention a sequence."""
    bounds = cu_seqlens.tolist()
    pieces = []
    for start, end in itertools.pairwise(bounds):
        if end > start:
            query, key, value = qkv[start:end].permute(1, 2, 0, 3)[:, None].unbind(0)
            attended = F.scaled_dot_product_attention(query, key, value)
            pieces.append(attended[0].transpose(0, 1))
    tail = qkv.shape[0] - bounds[-1]
    if tail:
        pieces.append(qkv.new_zeros(tail, *qkv.shape[2:]))
    return torch.cat(pieces)


SUITE = Suite("ablation", __doc__, cases, repeats=5)
main = SUITE.main
