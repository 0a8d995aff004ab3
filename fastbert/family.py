"""What a family of encoders is described by, and each of our models in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = Mapping[str, str]


@dataclass(frozen=True)
class Pooling:
    """What happens to a sequence's vector before a head's last projection.

    Attributes:
        activation: after the dense layer: tanh, gelu or relu.
        dropout_before: whether dropout stands in front of the dense layer too.
        has_norm: whether a LayerNorm follows.
    """

    activation: str = "tanh"
    dropout_before: bool = False
    has_norm: bool = False


@dataclass(frozen=True)
class Head:
    """One of our models in one family.

    Attributes:
        architecture: transformers' class.
        names: ours -> theirs, of everything past the encoder.
        pooling: None where there is no dense layer before the last projection.
        dropout: the configuration's field for dropout before the last projection; None for none.
        activation: of the masked-LM head; None for the encoder's.
        tied: their names for the word embedding as decoder.
        aliases: other names of theirs for the same tensor.
        labels: whether config.json's label names say something about this head.
        required: fields of config.json that must have this value.
    """

    architecture: str
    names: Names = field(default_factory=dict)
    pooling: Pooling | None = None
    dropout: str | None = None
    activation: str | None = None
    tied: tuple[str, ...] = ()
    aliases: Names = field(default_factory=dict)
    labels: bool = True
    required: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A kind of encoder.

    Attributes:
        model_type: in config.json.
        base: prefix of the encoder's tensors in models with a head.
        embeddings, layer: ours -> theirs; parts of a layer come after `layer_path`.
        layer_path: with {layer}, or {group} and {inner} where layers share weights.
        projection: the linear layer between embeddings of another width and the layers.
        qkv: the three projections that ours is fused of.
        heads: by the name of our class.
        fields: ours -> theirs, where the configuration's fields are named otherwise.
        defaults: of their configuration class, where they differ from EncoderConfig's.
        positions_after_padding: whether position ids start after the padding id's (fairseq).
        has_segments: whether there is a table of segments.
        attention_output_dropout, output_dropout: whether dropout stands in front of the two sums.
        pre_norm: whether norms stand before the halves of a layer (fastbert.pre_norm).
        final_norm: the norm after the last layer, where there is one.
    """

    model_type: str
    base: str
    embeddings: Names
    layer: Names
    layer_path: str
    heads: Mapping[str, Head]
    projection: str | None = None
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    fields: Names = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positions_after_padding: bool = False
    has_segments: bool = True
    attention_output_dropout: bool = True
    output_dropout: bool = True
    pre_norm: bool = False
    final_norm: str | None = None
