"""What an encoder is made of, under the names of Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.adapters import MODEL_TYPE, offer_targets
from fastbert.errors import InputError
from fastbert.families import family_of
from fastbert.family import Family
from fastbert.files import atomic_write

# layers, hidden size: the names of google-research/bert (Turc et al. 2019, arXiv:1908.08962)
SIZES: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
HEAD_DIM = 64
ACTIVATIONS = ("gelu", "gelu_new")
# other names in config.json for the same two functions
_ACTIVATION_NAMES = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}
# what says nothing about the model, or is written anew
_NOT_KEPT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "position_embedding_type",
    "torch_dtype",
    "transformers_version",
}
_REFUSED = ("is_decoder", "is_encoder_decoder", "add_cross_attention", "pruned_heads")


@dataclass
class EncoderConfig:
    """An encoder's sizes and constants (Devlin et al. 2018, arXiv:1810.04805, section 3).

    Raises:
        InputError: a value out of range; the message names the field.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    # "gelu" is the exact erf form, "gelu_new" the tanh approximation
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    # None: the same as hidden_dropout_prob
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    # classes of the pre-training head on sequence pairs: two, but for orders of more segments
    pair_classes: int = 2
    # standard deviation of the initial weights
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    # class names of a classification head, in the order of its outputs
    labels: list[str] = field(default_factory=list)
    # the family: bert, or another of fastbert.families
    model_type: str = "bert"
    # width of the embeddings; None: hidden_size
    embedding_size: int | None = None
    # groups of layers with weights of their own; None: every layer has its own
    num_hidden_groups: int | None = None
    # layers within a group
    inner_group_num: int = 1
    # fields of config.json that others read, kept for them
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("embedding_size", "num_hidden_groups", "classifier_dropout"):
            if getattr(self, name) is None:
                setattr(self, name, self.family.defaults.get(name))
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "pair_classes",
            "inner_group_num",
            "embedding_size",
            "num_hidden_groups",
        ):
            value = getattr(self, name)
            if value is None and name in ("embedding_size", "num_hidden_groups"):
                continue
            if not isinstance(value, int) or value < 1:
                raise InputError(f"config: {name} must be a positive integer, got {value!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise InputError(f"config: {name} must be in [0, 1), got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not value >= 0.0:
                raise InputError(f"config: {name} must be a number of at least 0, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"config: hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        self.hidden_act = _ACTIVATION_NAMES.get(self.hidden_act, self.hidden_act)
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"config: hidden_act must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.hidden_act!r}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def family(self) -> Family:
        """What sets this encoder's kind apart."""
        return family_of(self.model_type)

    @property
    def position_offset(self) -> int:
        """The position id of a sequence's first token."""
        return self.pad_token_id + 1 if self.family.positions_after_padding else 0

    @property
    def max_seqlen(self) -> int:
        """Tokens that a sequence may have."""
        return self.max_position_embeddings - self.position_offset

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings and of the masked-LM decoder."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier; two where nobody named them, as in transformers."""
        return len(self.labels) or 2

    def dropout(self, name: str | None) -> float:
        """The dropout probability that a head's data name; 0 for None."""
        if name is None:
            return 0.0
        if name in self.extra or name in self.family.defaults:
            return float(self.extra.get(name, self.family.defaults.get(name, 0.0)))
        return float(getattr(self, name))

    @property
    def classifier_dropout_prob(self) -> float:
        """Dropout in front of a task head."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    def without_labels(self) -> EncoderConfig:
        """The same for a model whose outputs the labels do not name."""
        return dataclasses.replace(self, labels=[])

    @classmethod
    def named(cls, size: str, **fields: Any) -> EncoderConfig:
        """One of Google's published sizes: tiny, mini, small, medium, base, large.

        Args:
            size: the name.
            fields: other fields, e.g. `vocab_size`.
        """
        if size not in SIZES:
            raise InputError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        layers, hidden = SIZES[size]
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": hidden // HEAD_DIM,
            "intermediate_size": 4 * hidden,
        }
        return cls(**{**shape, **fields})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> EncoderConfig:
        """Read Hugging Face's dictionary; fields that say nothing about the encoder are ignored.

        Raises:
            InputError: the dictionary describes a model this encoder does not compute.
        """
        family = family_of(raw.get("model_type", "bert"), where)
        _refuse_unsupported(raw, where)
        known = {f.name for f in dataclasses.fields(cls)} - {"labels", "extra", "model_type"}
        theirs = {name: family.fields.get(name, name) for name in known}
        values = {name: family.defaults[name] for name in known if name in family.defaults}
        values |= {name: raw[theirs[name]] for name in known if theirs[name] in raw}
        missing = [theirs[n] for n in ("vocab_size", "hidden_size") if theirs[n] not in raw]
        if missing:
            raise InputError(f"{where}: no field {' and '.join(missing)}: not an encoder's config")
        read = {*theirs.values(), *_NOT_KEPT}
        values["extra"] = {name: raw[name] for name in raw if name not in read}
        values["model_type"] = family.model_type
        if values.get("pad_token_id", 0) is None:
            del values["pad_token_id"]
        labels = raw.get("id2label") or {}
        try:
            values["labels"] = [str(labels[key]) for key in sorted(labels, key=int)]
            return cls(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except (TypeError, ValueError, LookupError) as error:
            raise InputError(f"{where}: unreadable value: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> EncoderConfig:
        """Read `config.json` in `folder`."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{folder}: no config.json: not a saved model's folder") from None
        # besides JSON that is none: a number of too many digits, lists too deep
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: unreadable: {error}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return cls.from_dict(raw, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Our fields by our names, and a model type of our own: what peft asks a model for.

        It is the moment at which peft looks up default targets, so that they are offered here.
        """
        offer_targets()
        return {**dataclasses.asdict(self), "model_type": MODEL_TYPE}

    def to_hugging_face(self, architecture: str | None = None) -> dict[str, Any]:
        """The dictionary of a Hugging Face `config.json` of this family.

        Args:
            architecture: transformers' class.
        """
        values = dataclasses.asdict(self)
        labels, extra = values.pop("labels"), values.pop("extra")
        if self.pair_classes == 2:
            del values["pair_classes"]
        # fields of other families
        if self.embedding_size is None:
            del values["embedding_size"]
        if self.num_hidden_groups is None:
            del values["num_hidden_groups"], values["inner_group_num"]
        raw = {**extra, **{self.family.fields.get(name, name): values[name] for name in values}}
        raw |= {"position_embedding_type": "absolute", "dtype": "float32"}
        if architecture is not None:
            raw["architectures"] = [architecture]
        if labels:
            raw["id2label"] = {str(index): label for index, label in enumerate(labels)}
            raw["label2id"] = {label: index for index, label in enumerate(labels)}
        return raw

    def save_pretrained(
        self, folder: str | os.PathLike[str], architecture: str | None = None
    ) -> None:
        """Write `config.json` into `folder`."""
        with atomic_write(Path(folder) / "config.json") as file:
            json.dump(self.to_hugging_face(architecture), file, indent=2, sort_keys=True)
            file.write("\n")


def refuse_foreign_tokenizer(tokenizer_vocab_size: int, config: EncoderConfig, where: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for; fewer ids are common.

    Raises:
        InputError: naming `where`, the folder or the command.
    """
    if tokenizer_vocab_size > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has {tokenizer_vocab_size:,} ids, the model "
            f"{config.vocab_size:,} (vocab_size): they are not of one model"
        )


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    positions = raw.get("position_embedding_type", "absolute")
    if positions not in ("absolute", None):
        raise InputError(f"{where}: position_embedding_type must be absolute, got {positions!r}")
    for name in _REFUSED:
        if raw.get(name):
            raise InputError(f"{where}: {name} is set: only encoders are supported")
    if raw.get("quantization_config"):
        raise InputError(f"{where}: quantization_config is set: only plain weights are supported")
