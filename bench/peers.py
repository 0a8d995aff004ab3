"""The other side of a comparison: transformers on a padded batch."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.models import Model
from fastbert.packing import IGNORE_INDEX, Examples


def transformers() -> Any:
    """The package.

    Raises:
        InputError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError(
            "transformers is not installed, and the comparison needs it: "
            "pip install 'fastbert[bench]'"
        ) from None


def bert_for_masked_lm(folder: str | os.PathLike[str], device: torch.device) -> nn.Module:
    """transformers' BertForMaskedLM in fp32 with sdpa attention, in training mode."""
    package = transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    model = package.BertForMaskedLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32, local_files_only=True
    )
    return model.to(device).train()  # type: ignore[no-any-return]


def padded(examples: Examples, device: torch.device) -> dict[str, Tensor]:
    """All sequences as one batch padded to its longest, as transformers' collators do."""
    assert examples.masked_positions is not None and examples.labels is not None
    lengths = examples.lengths
    shape = (len(examples), int(lengths.max()))
    real = np.arange(shape[1]) < lengths[:, None]
    labels = np.full(len(examples.input_ids), IGNORE_INDEX, dtype=np.int64)
    labels[examples.masked_positions] = examples.labels
    columns = {
        "input_ids": (examples.input_ids, 0),
        "token_type_ids": (examples.token_type_ids, 0),
        "attention_mask": (np.ones_like(labels), 0),
        "labels": (labels, IGNORE_INDEX),
    }
    batch = {}
    for name, (values, fill) in columns.items():
        column = np.full(shape, fill, dtype=np.int64)
        column[real] = values
        batch[name] = torch.from_numpy(column).to(device)
    return batch


def flattened(examples: Examples, device: torch.device) -> dict[str, Tensor]:
    """All sequences as one row: positions begin anew in each, and a mask keeps them apart.

    transformers' collator for this leaves the mask to FlashAttention, which reads it off the
    positions; BERT's other attentions would let every sequence see all others.
    """
    assert examples.masked_positions is not None and examples.labels is not None
    lengths = torch.from_numpy(np.asarray(examples.lengths))
    labels = torch.full((len(examples.input_ids),), IGNORE_INDEX)
    labels[torch.from_numpy(examples.masked_positions)] = torch.from_numpy(examples.labels)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    rows = {
        "input_ids": torch.from_numpy(np.asarray(examples.input_ids, dtype=np.int64)),
        "token_type_ids": torch.from_numpy(np.asarray(examples.token_type_ids, dtype=np.int64)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()]),
        "labels": labels,
    }
    batch = {name: row[None].to(device) for name, row in rows.items()}
    batch["attention_mask"] = (owner[:, None] == owner)[None, None].to(device)
    return batch


def gradients_by_our_names(peer: nn.Module, model: Model) -> dict[str, Tensor]:
    """The peer's gradients under the names of our model's parameters, fused as ours are."""
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    return {
        name: torch.cat([theirs[part] for part in model.names.theirs(name)])
        for name, _ in model.named_parameters()
    }


def parameter_groups(peer: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As ours: no weight decay for biases and norms."""
    parameters = list(peer.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
