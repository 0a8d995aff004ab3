"""A task's outputs for all units, packed under a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.data.epochs import snug_capacity
from fastbert.packing import best_fit
from fastbert.tasks.task import Raw, Task
from fastbert.tasks.units import Units

# tokens a batch where no gradient is wanted
TOKEN_BUDGET = 4096


def run(
    task: Task,
    model: nn.Module,
    units: Units,
    *,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], Any] | None = None,
) -> Raw:
    """Outputs in the order of the units; no padding is computed.

    Args:
        task: whose model it is.
        model: on its device.
        units: targets are not looked at.
        dtype: of matrix products.
        token_budget: tokens a batch, more where one unit needs more.
        progress: told how many units are done after each batch.
    """
    device = next(model.parameters()).device
    budget = max(token_budget, int(units.lengths.max(initial=0)))
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    sequences: dict[int, np.ndarray] = {}
    tokens: dict[int, np.ndarray] = {}
    with torch.inference_mode(), mixed:
        for chosen in best_fit(units.lengths, budget):
            batch = units.batch(chosen, snug_capacity(units.lengths[chosen]))
            outputs = task.forward(model, batch.to(device))  # type: ignore[arg-type]
            own = units.sequences_of(np.asarray(chosen, dtype=np.int64)).tolist()
            if outputs.sequences is not None:
                names = chosen if outputs.pooled else own
                sequences.update(zip(names, _on_host(outputs.sequences), strict=True))
            if outputs.tokens is not None:
                bounds = batch.cu_seqlens[1:-1].tolist()
                values = _on_host(outputs.tokens)[: batch.num_tokens]
                tokens.update(zip(own, np.split(values, bounds), strict=True))
            if progress:
                progress(len(chosen))
    count = len(units.input_ids)
    return Raw(
        np.stack([sequences[n] for n in range(len(sequences))]) if sequences else None,
        [tokens[n] for n in range(count)] if tokens else None,
        task.shared(model),
    )


def mean_of(raws: Sequence[Raw]) -> Raw:
    """The ensemble of several models: the mean of their outputs."""
    first = raws[0]
    if len(raws) == 1:
        return first
    sequences = tokens = None
    if first.sequences is not None:
        sequences = np.mean([raw.sequences for raw in raws if raw.sequences is not None], axis=0)
    if first.tokens is not None:
        lists = [raw.tokens for raw in raws if raw.tokens is not None]
        tokens = [np.mean(parts, axis=0) for parts in zip(*lists, strict=True)]
    shared = None
    if first.shared is not None:
        shared = np.mean([raw.shared for raw in raws if raw.shared is not None], axis=0)
    return Raw(sequences, tokens, shared)


def _on_host(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def log_softmax(values: np.ndarray) -> np.ndarray:
    """[..., classes] float64."""
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(values: np.ndarray) -> np.ndarray:
    """[..., classes] probabilities in the dtype of the logits."""
    return np.exp(log_softmax(values)).astype(values.dtype)


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Probabilities of yes, in the dtype of the logits."""
    # the exponent is never positive, so nothing overflows
    small = np.exp(-np.abs(values.astype(np.float64)))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(values.dtype)
