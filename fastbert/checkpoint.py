"""Weights on disk in Hugging Face's layout, and the names both sides use for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.families import head_of
from fastbert.family import Family, Head
from fastbert.files import atomic_write

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# what others' older folders hold instead
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"

_LAYER_PART = re.compile(r"encoder\.layers\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class NameMap:
    """Our names and theirs for one model of one family.

    Attributes:
        family: of the encoder.
        head: which of the family's models.
        inner_group_num: layers within a group that shares weights.
        has_head: whether their names carry the family's prefix.
    """

    family: Family
    head: Head
    inner_group_num: int
    has_head: bool

    @classmethod
    def of(cls, config: EncoderConfig, name: str) -> NameMap:
        """For our model class `name`.

        Raises:
            InputError: the family has no such model.
        """
        head = head_of(config.model_type, name)
        return cls(config.family, head, config.inner_group_num, has_head=name != "BertModel")

    def theirs(self, name: str, *, prefixed: bool = True) -> list[str]:
        """The tensors that one parameter of ours is stored as.

        Args:
            name: of a parameter of the model.
            prefixed: with the prefix that their models with a head carry.

        Returns:
            One name, or several for the fused projection.
        """
        base = self.family.base if self.has_head and prefixed else ""
        if name in self.head.names:
            return [self.head.names[name].format(base=base)]
        stem, _, kind = name.rpartition(".")
        if stem in self.head.names:
            return [f"{self.head.names[stem].format(base=base)}.{kind}"]
        layer = _LAYER_PART.fullmatch(stem)
        if layer:
            path, part = base + self._layer_path(int(layer[1])), layer[2]
            if part == "qkv":
                return [f"{path}{which}.{kind}" for which in self.family.qkv]
            return [f"{path}{self.family.layer[part]}.{kind}"]
        if stem in ("encoder.projection", "encoder.final_norm"):
            whole = stem.removeprefix("encoder.")
            return [f"{base}{getattr(self.family, whole)}.{kind}"]
        return [f"{base}{self.family.embeddings[stem.removeprefix('encoder.embeddings.')]}.{kind}"]

    def canonical(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Their tensors under the names of `theirs(..., prefixed=False)`: old names made new."""
        found: dict[str, Any] = {}
        # names that differ only by an alias must not hide the tensor itself
        for name in sorted(tensors, key=lambda name: self._modern(name) in self.head.aliases):
            modern = self._modern(name)
            found.setdefault(self.head.aliases.get(modern, modern), tensors[name])
        return found

    def _modern(self, name: str) -> str:
        name = name.removeprefix(self.family.base)
        if name.endswith("LayerNorm.gamma"):
            return name.removesuffix("gamma") + "weight"
        if name.endswith("LayerNorm.beta"):
            return name.removesuffix("beta") + "bias"
        return name

    def _layer_path(self, layer: int) -> str:
        group, inner = divmod(layer, self.inner_group_num)
        return self.family.layer_path.format(layer=layer, group=group, inner=inner)


def to_hugging_face(state: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
    """A model's state under Hugging Face's names, on the CPU; the fused projection is split."""
    result = {}
    for name, tensor in state.items():
        theirs = names.theirs(name)
        parts = tensor.detach().cpu().chunk(len(theirs))
        result.update({n: part.contiguous() for n, part in zip(theirs, parts, strict=True)})
    return result


def from_hugging_face(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: NameMap, where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Find a model's state among a checkpoint's tensors.

    Args:
        tensors: as read; names with or without the family's prefix, old names accepted.
        wanted: the model's own state, for names and shapes.
        names: of the model.
        where: the file, for messages.

    Returns:
        The state found, in fp32, and the names of ours that the checkpoint lacks.

    Raises:
        InputError: a tensor has another shape than the model's, or a masked-LM decoder is not the
            word embedding.
    """
    found = names.canonical(tensors)
    state, missing = {}, []
    for name, like in wanted.items():
        theirs = names.theirs(name, prefixed=False)
        parts = [found[part] for part in theirs if part in found]
        if len(parts) < len(theirs):
            missing.append(name)
            continue
        expected = [len(like) // len(theirs), *like.shape[1:]]
        for part_name, part in zip(theirs, parts, strict=True):
            _refuse_shape(where, part_name, list(part.shape), expected)
        state[name] = torch.cat(parts).to(torch.float32)
    _refuse_untied(found, names, where)
    return state, missing


def write_weights(folder: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    """Write `model.safetensors`, whole or not at all."""
    with atomic_write(Path(folder) / WEIGHTS_FILE, "wb") as file:
        # the metadata entry is what transformers asks of a file it is to load
        file.write(save(tensors, metadata={"format": "pt"}))


def weights_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files that hold a folder's weights: one, or several with an index beside them.

    Raises:
        InputError: none there, or an index that cannot be read or names a file that is not there.
    """
    folder = Path(folder)
    for name, index in ((WEIGHTS_FILE, INDEX_FILE), (PICKLED_FILE, PICKLED_INDEX_FILE)):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            return _shards(folder / index)
    raise InputError(
        f"{folder}: no {WEIGHTS_FILE}, {INDEX_FILE} or {PICKLED_FILE}: not a saved model's folder"
    )


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a folder's weights: safetensors, sharded or not, or an older pytorch_model.bin.

    Raises:
        InputError: no such file, or one that is damaged or holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in weights_files(folder):
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            tensors |= _unpickled(path)
    return tensors


def stored_shapes(folder: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Shapes of a folder's tensors; of safetensors, the headers alone are read.

    Raises:
        InputError: no such file, or one that is damaged.
    """
    shapes: dict[str, list[int]] = {}
    for path in weights_files(folder):
        if path.suffix == ".safetensors":
            with _opened(path) as file:
                shapes |= {n: list(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        else:
            shapes |= {name: list(tensor.shape) for name, tensor in _unpickled(path).items()}
    return shapes


def refuse_other_sizes(
    folder: str | os.PathLike[str], config: EncoderConfig, names: NameMap
) -> None:
    """Compare config.json with the weights' headers, before memory is asked for.

    Sizes that the headers do not tell are left to `from_hugging_face`.

    Raises:
        InputError: a size that the weights do not have; no such file, or one that is damaged.
    """
    where = weights_files(folder)[0]
    shapes = names.canonical(stored_shapes(folder))
    width = config.embedding_width
    for name, expected in {
        "encoder.embeddings.word_embeddings.weight": [config.vocab_size, width],
        "encoder.embeddings.position_embeddings.weight": [config.max_position_embeddings, width],
        "encoder.embeddings.token_type_embeddings.weight": [config.type_vocab_size, width],
        "encoder.layers.0.intermediate.weight": [
            config.intermediate_size * (2 if names.family.pre_norm else 1),
            config.hidden_size,
        ],
    }.items():
        if name.split(".")[2] in names.family.embeddings or ".layers." in name:
            theirs = names.theirs(name, prefixed=False)[0]
            _refuse_shape(where, theirs, shapes.get(theirs, expected), expected)
    pattern = re.escape(names.family.layer_path).replace(r"\{layer\}", r"(\d+)")
    matches = [re.match(pattern, name) for name in shapes] if "(" in pattern else []
    layers = {found[1] for found in matches if found}
    if layers and config.num_hidden_layers > len(layers):
        raise InputError(
            f"{where}: {len(layers)} layers in the file, config.json says "
            f"{config.num_hidden_layers} (num_hidden_layers)"
        )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: unreadable: {error}") from None
    for name, path in zip(names, paths, strict=True):
        # a name with a folder in it could lead anywhere
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{index}: names {name!r}, which is not in the folder")
    return paths


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: damaged, or holds more than tensors: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"{path}: expected tensors by name")
    return content


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
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


def _refuse_untied(found: dict[str, Tensor], names: NameMap, where: str) -> None:
    words = found.get(names.theirs("encoder.embeddings.word_embeddings.weight", prefixed=False)[0])
    for name in names.head.tied:
        decoder = found.get(name)
        if words is not None and decoder is not None and not torch.equal(words, decoder):
            raise InputError(
                f"{where}: {name} differs from the word embedding: "
                "only decoders tied to it are supported"
            )
