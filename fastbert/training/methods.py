"""Methods of fine-tuning that know no task: freezing, layer-wise rates, class weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.errors import InputError

CLASS_WEIGHTS = ("none", "balanced")
_LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)encoder\.(?:embeddings|projection)\.")


def parse_freeze(freeze: str) -> int:
    """How many layers are frozen: -1 none, 0 the embeddings alone, a large number all.

    Raises:
        InputError: no such choice.
    """
    if freeze in ("none", "embeddings", "encoder"):
        return {"none": -1, "embeddings": 0, "encoder": 1 << 20}[freeze]
    if freeze.isascii() and freeze.isdigit() and int(freeze) > 0:
        return int(freeze)
    raise InputError(
        f"--freeze must be none, embeddings, a number of layers or encoder, got {freeze!r}"
    )


def count_layers(model: nn.Module) -> int:
    """Layers with weights of their own; in ALBERT fewer than are computed."""
    return 1 + max(
        (int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name))),
        default=-1,
    )


def freeze_layers(model: nn.Module, freeze: str) -> int:
    """Take embeddings and first layers out of training.

    Args:
        model: its encoder's parameters are named "encoder.".
        freeze: "none", "embeddings", a number of layers (and the embeddings), or "encoder".

    Returns:
        How many numbers are still trained.
    """
    count = parse_freeze(freeze)
    trained = 0
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        frozen = (layer and int(layer[1]) < count) or (count >= 0 and _EMBEDDINGS.search(name))
        parameter.requires_grad_(not frozen)
        trained += 0 if frozen else parameter.numel()
    return trained


def layer_rates(layers: int, decay: float) -> Callable[[str], float] | None:
    """Learning rates that fall from the last layer to the embeddings (Howard and Ruder 2018).

    Args:
        layers: with weights of their own (`count_layers`).
        decay: rate of a layer over that of the one above; heads take the last layer's.

    Returns:
        What a parameter's rate is multiplied by, of its name; None for 1 throughout.
    """
    if decay == 1.0:
        return None

    def factor(name: str) -> float:
        layer = _LAYER.search(name)
        if layer:
            return float(decay ** (layers - 1 - int(layer[1])))
        return float(decay**layers) if _EMBEDDINGS.search(name) else 1.0

    return factor


def class_weights(kind: str, counts: np.ndarray | None) -> Tensor | None:
    """Weights of classes by how rare they are, mean 1 over the training examples.

    Args:
        kind: of `CLASS_WEIGHTS`.
        counts: [classes] training examples of each; not looked at for "none".
    """
    if kind == "none" or counts is None:
        return None
    present = counts > 0
    weights = np.zeros(len(counts), dtype=np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return torch.from_numpy(weights)
