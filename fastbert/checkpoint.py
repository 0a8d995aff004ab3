"""Weights on disk in Hugging Face's layout: safetensors, and the names both sides use."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.files import atomic_write

WEIGHTS_FILE = "model.safetensors"

# ours -> theirs, without the "bert." of models that carry a head; {} is weight or bias
_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "embeddings.norm": "embeddings.LayerNorm",
}
_LAYER = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_HEADS = {
    "masked_lm.dense": "cls.predictions.transform.dense",
    "masked_lm.norm": "cls.predictions.transform.LayerNorm",
    "masked_lm.bias": "cls.predictions.bias",
    "next_sentence": "cls.seq_relationship",
    "classifier.dense": "classifier",
}
_LAYER_NUMBER = re.compile(r"encoder\.layer\.(\d+)\.")
_QKV = ("query", "key", "value")


def hugging_face_names(name: str, prefix: str) -> list[str]:
    """The tensors that one parameter of ours is stored as.

    Args:
        name: a parameter of one of `fastbert.models`.
        prefix: "bert." for models with a head, "" for a bare BertModel.

    Returns:
        One name, or three (query, key, value) for the fused projection.
    """
    stem, _, kind = name.rpartition(".")
    if name.startswith("encoder.embeddings."):
        inner = name.removeprefix("encoder.")
        stem = stem.removeprefix("encoder.")
        return [prefix + (_EMBEDDINGS.get(inner) or f"{_EMBEDDINGS[stem]}.{kind}")]
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)", stem)
    if layer:
        number, part = layer.groups()
        base = f"{prefix}encoder.layer.{number}."
        if part == "qkv":
            return [f"{base}attention.self.{which}.{kind}" for which in _QKV]
        return [f"{base}{_LAYER[part]}.{kind}"]
    if stem == "pooler.dense":
        return [f"{prefix}pooler.dense.{kind}"]
    return [_HEADS[name] if name in _HEADS else f"{_HEADS[stem]}.{kind}"]


def to_hugging_face(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A model's state under Hugging Face's names, on the CPU; the fused projection is split."""
    result = {}
    for name, tensor in state.items():
        names = hugging_face_names(name, prefix)
        parts = tensor.detach().cpu().chunk(len(names))
        result.update({n: part.contiguous() for n, part in zip(names, parts, strict=True)})
    return result


def from_hugging_face(
    tensors: dict[str, Tensor], wanted: dict[str, Tensor], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Find a model's state among a checkpoint's tensors.

    Args:
        tensors: as read; names with or without "bert.", old names for norms accepted.
        wanted: the model's own state, for names and shapes.
        where: the file, for messages.

    Returns:
        The state found, in fp32, and the names of ours that the checkpoint lacks.

    Raises:
        InputError: a tensor has another shape than the model's, or a masked-LM decoder is not the
            word embedding.
    """
    found = {_modern(name): tensor for name, tensor in tensors.items()}
    state, missing = {}, []
    for name, like in wanted.items():
        names = hugging_face_names(name, prefix="")
        parts = [found[theirs] for theirs in names if theirs in found]
        if len(parts) < len(names):
            missing.append(name)
            continue
        expected = [len(like) // len(names), *like.shape[1:]]
        for theirs, part in zip(names, parts, strict=True):
            _refuse_shape(where, theirs, list(part.shape), expected)
        state[name] = torch.cat(parts).to(torch.float32)
    if "masked_lm.bias" in wanted:
        _refuse_untied(found, where)
    return state, missing


def write_weights(folder: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write `model.safetensors`, whole or not at all."""
    with atomic_write(Path(folder) / WEIGHTS_FILE, "wb") as file:
        # the metadata entry is what transformers asks of a file it is to load
        file.write(save(tensors, metadata={"format": "pt"}))


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read `model.safetensors`.

    Raises:
        InputError: no such file, or one that is damaged.
    """
    with _opened(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def refuse_other_sizes(folder: str | os.PathLike[str], config: EncoderConfig) -> None:
    """Compare config.json with the header of `model.safetensors`, before memory is asked for.

    Sizes that the header does not tell are left to `from_hugging_face`.

    Raises:
        InputError: a size that the weights do not have; no such file, or one that is damaged.
    """
    where = Path(folder) / WEIGHTS_FILE
    with _opened(folder) as file:
        shapes = {_modern(name): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    hidden = config.hidden_size
    for name, expected in {
        "embeddings.word_embeddings.weight": [config.vocab_size, hidden],
        "embeddings.position_embeddings.weight": [config.max_position_embeddings, hidden],
        "embeddings.token_type_embeddings.weight": [config.type_vocab_size, hidden],
        "encoder.layer.0.intermediate.dense.weight": [config.intermediate_size, hidden],
    }.items():
        _refuse_shape(where, name, shapes.get(name, expected), expected)
    layers = {found[1] for found in map(_LAYER_NUMBER.match, shapes) if found}
    if layers and config.num_hidden_layers > len(layers):
        raise InputError(
            f"{where}: {len(layers)} layers in the file, config.json says "
            f"{config.num_hidden_layers} (num_hidden_layers)"
        )


@contextlib.contextmanager
def _opened(folder: str | os.PathLike[str]) -> Iterator[Any]:
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {WEIGHTS_FILE}: not a saved model's folder")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or not a safetensors file: {error}") from None


def summarise(names: Iterable[str], shown: int = 3) -> str:
    """A few names and the count of the rest, for one line of a message."""
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _refuse_shape(where: str | Path, name: str, found: list[int], expected: list[int]) -> None:
    if found != expected:
        raise InputError(
            f"{where}: {name} has shape {found} in the file, config.json says {expected}"
        )


def _refuse_untied(found: dict[str, Tensor], where: str) -> None:
    words = found.get("embeddings.word_embeddings.weight")
    decoder = found.get("cls.predictions.decoder.weight")
    if words is not None and decoder is not None and not torch.equal(words, decoder):
        raise InputError(
            f"{where}: cls.predictions.decoder.weight differs from the word embedding: "
            "only decoders tied to it are supported"
        )


def _modern(name: str) -> str:
    name = name.removeprefix("bert.")
    if name.endswith("LayerNorm.gamma"):
        return name.removesuffix("gamma") + "weight"
    if name.endswith("LayerNorm.beta"):
        return name.removesuffix("beta") + "bias"
    if name == "cls.predictions.decoder.bias":
        return "cls.predictions.bias"
    return name
