"""What sets the families of encoders apart, as data: names of fields and tensors, and their heads.

Theirs are the names of Hugging Face's config.json and checkpoints. In the names of heads, "{base}"
stands for the prefix that models with a head put before the encoder's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastbert.errors import InputError
from fastbert.family import Family, Head, Pooling

_EMBEDDINGS = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_POOLER = {"pooler.dense": "{base}pooler.dense"}
_CLASSIFIER = {"classifier.dense": "classifier"}
_SPAN = {"span.dense": "qa_outputs"}
# a dense layer and the last projection as one module of theirs
_DEEP_CLASSIFIER = {"pooler.dense": "classifier.dense", "classifier.dense": "classifier.out_proj"}


def _bert() -> Family:
    prediction = {
        "masked_lm.dense": "cls.predictions.transform.dense",
        "masked_lm.norm": "cls.predictions.transform.LayerNorm",
        "masked_lm.bias": "cls.predictions.bias",
    }
    relationship = {"next_sentence": "cls.seq_relationship"}
    masked: dict[str, Any] = {
        "tied": ("cls.predictions.decoder.weight",),
        "aliases": {"cls.predictions.decoder.bias": "cls.predictions.bias"},
    }
    dropped: dict[str, Any] = {"dropout": "classifier_dropout_prob"}
    heads = {
        "BertModel": Head("BertModel", _POOLER, Pooling()),
        "BertForPreTraining": Head(
            "BertForPreTraining", {**_POOLER, **prediction, **relationship}, Pooling(), **masked
        ),
        "BertForMaskedLM": Head("BertForMaskedLM", prediction, **masked),
        "BertForNextSentencePrediction": Head(
            "BertForNextSentencePrediction", {**_POOLER, **relationship}, Pooling()
        ),
        "BertForSequenceClassification": Head(
            "BertForSequenceClassification", {**_POOLER, **_CLASSIFIER}, Pooling(), **dropped
        ),
        "BertForTokenClassification": Head("BertForTokenClassification", _CLASSIFIER, **dropped),
        "BertForQuestionAnswering": Head("BertForQuestionAnswering", _SPAN, labels=False),
        "BertForMultipleChoice": Head(
            "BertForMultipleChoice", {**_POOLER, **_CLASSIFIER}, Pooling(), **dropped, labels=False
        ),
    }
    return Family("bert", "bert.", _EMBEDDINGS, _LAYER, "encoder.layer.{layer}.", heads)


def _roberta(model_type: str, prefix: str) -> Family:
    masked = {
        "masked_lm.dense": "lm_head.dense",
        "masked_lm.norm": "lm_head.layer_norm",
        "masked_lm.bias": "lm_head.bias",
    }
    dropped: dict[str, Any] = {"dropout": "classifier_dropout_prob"}
    heads = {
        "BertModel": Head(f"{prefix}Model", _POOLER, Pooling()),
        "BertForMaskedLM": Head(
            f"{prefix}ForMaskedLM",
            masked,
            activation="gelu",
            tied=("lm_head.decoder.weight",),
            aliases={"lm_head.decoder.bias": "lm_head.bias"},
        ),
        "BertForSequenceClassification": Head(
            f"{prefix}ForSequenceClassification",
            _DEEP_CLASSIFIER,
            Pooling(dropout_before=True),
            **dropped,
        ),
        "BertForTokenClassification": Head(
            f"{prefix}ForTokenClassification", _CLASSIFIER, **dropped
        ),
        "BertForQuestionAnswering": Head(f"{prefix}ForQuestionAnswering", _SPAN, labels=False),
        "BertForMultipleChoice": Head(
            f"{prefix}ForMultipleChoice",
            {**_POOLER, **_CLASSIFIER},
            Pooling(),
            dropout="hidden_dropout_prob",
            labels=False,
        ),
    }
    return Family(
        model_type,
        "roberta.",
        _EMBEDDINGS,
        _LAYER,
        "encoder.layer.{layer}.",
        heads,
        defaults={"pad_token_id": 1},
        positions_after_padding=True,
    )


def _distilbert() -> Family:
    masked = {
        "masked_lm.dense": "vocab_transform",
        "masked_lm.norm": "vocab_layer_norm",
        "masked_lm.bias": "vocab_projector.bias",
    }
    pooled = {"pooler.dense": "pre_classifier", **_CLASSIFIER}
    relu: dict[str, Any] = {"pooling": Pooling("relu"), "dropout": "seq_classif_dropout"}
    heads = {
        "BertModel": Head("DistilBertModel"),
        "BertForMaskedLM": Head("DistilBertForMaskedLM", masked, tied=("vocab_projector.weight",)),
        "BertForSequenceClassification": Head(
            "DistilBertForSequenceClassification", pooled, **relu
        ),
        "BertForTokenClassification": Head(
            "DistilBertForTokenClassification", _CLASSIFIER, dropout="hidden_dropout_prob"
        ),
        "BertForQuestionAnswering": Head(
            "DistilBertForQuestionAnswering", _SPAN, dropout="qa_dropout", labels=False
        ),
        "BertForMultipleChoice": Head("DistilBertForMultipleChoice", pooled, **relu, labels=False),
    }
    return Family(
        "distilbert",
        "distilbert.",
        {name: _EMBEDDINGS[name] for name in ("word_embeddings", "position_embeddings", "norm")},
        {
            "attention_output": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "intermediate": "ffn.lin1",
            "output": "ffn.lin2",
            "output_norm": "output_layer_norm",
        },
        "transformer.layer.{layer}.",
        heads,
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        fields={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
            "hidden_act": "activation",
        },
        defaults={
            "num_hidden_layers": 6,
            "type_vocab_size": 1,
            "seq_classif_dropout": 0.2,
            "qa_dropout": 0.1,
        },
        has_segments=False,
        attention_output_dropout=False,
    )


def _albert() -> Family:
    prediction = {
        "masked_lm.dense": "predictions.dense",
        "masked_lm.norm": "predictions.LayerNorm",
        "masked_lm.bias": "predictions.bias",
    }
    masked: dict[str, Any] = {
        "tied": ("predictions.decoder.weight",),
        "aliases": {"predictions.decoder.bias": "predictions.bias"},
    }
    pooler = {"pooler.dense": "{base}pooler"}
    dropped: dict[str, Any] = {"dropout": "classifier_dropout_prob"}
    heads = {
        "BertModel": Head("AlbertModel", pooler, Pooling()),
        "BertForPreTraining": Head(
            "AlbertForPreTraining",
            {**pooler, **prediction, "next_sentence": "sop_classifier.classifier"},
            Pooling(),
            **masked,
            **dropped,
            labels=False,
        ),
        "BertForMaskedLM": Head("AlbertForMaskedLM", prediction, **masked),
        "BertForSequenceClassification": Head(
            "AlbertForSequenceClassification", {**pooler, **_CLASSIFIER}, Pooling(), **dropped
        ),
        "BertForTokenClassification": Head("AlbertForTokenClassification", _CLASSIFIER, **dropped),
        "BertForQuestionAnswering": Head("AlbertForQuestionAnswering", _SPAN, labels=False),
        "BertForMultipleChoice": Head(
            "AlbertForMultipleChoice", {**pooler, **_CLASSIFIER}, Pooling(), **dropped, labels=False
        ),
    }
    return Family(
        "albert",
        "albert.",
        _EMBEDDINGS,
        {
            "attention_output": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "intermediate": "ffn",
            "output": "ffn_output",
            "output_norm": "full_layer_layer_norm",
        },
        "encoder.albert_layer_groups.{group}.albert_layers.{inner}.",
        heads,
        projection="encoder.embedding_hidden_mapping_in",
        qkv=("attention.query", "attention.key", "attention.value"),
        fields={"classifier_dropout": "classifier_dropout_prob"},
        defaults={
            "hidden_act": "gelu_new",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.1,
            "embedding_size": 128,
            "num_hidden_groups": 1,
        },
        output_dropout=False,
    )


def _electra() -> Family:
    masked = {
        "masked_lm.dense": "generator_predictions.dense",
        "masked_lm.norm": "generator_predictions.LayerNorm",
        "masked_lm.bias": "generator_lm_head.bias",
    }
    detection = {
        "detection.dense": "discriminator_predictions.dense",
        "detection.projection": "discriminator_predictions.dense_prediction",
    }
    dropped: dict[str, Any] = {"dropout": "classifier_dropout_prob"}
    heads = {
        "BertModel": Head("ElectraModel"),
        "BertForMaskedLM": Head(
            "ElectraForMaskedLM", masked, activation="gelu", tied=("generator_lm_head.weight",)
        ),
        "BertForReplacedTokenDetection": Head("ElectraForPreTraining", detection, labels=False),
        "BertForSequenceClassification": Head(
            "ElectraForSequenceClassification",
            _DEEP_CLASSIFIER,
            Pooling("gelu", dropout_before=True),
            **dropped,
        ),
        "BertForTokenClassification": Head("ElectraForTokenClassification", _CLASSIFIER, **dropped),
        "BertForQuestionAnswering": Head("ElectraForQuestionAnswering", _SPAN, labels=False),
        "BertForMultipleChoice": Head(
            "ElectraForMultipleChoice",
            {"pooler.dense": "sequence_summary.summary", **_CLASSIFIER},
            Pooling("gelu"),
            dropout="summary_last_dropout",
            labels=False,
            required={
                "summary_type": "first",
                "summary_use_proj": True,
                "summary_activation": "gelu",
            },
        ),
    }
    return Family(
        "electra",
        "electra.",
        _EMBEDDINGS,
        _LAYER,
        "encoder.layer.{layer}.",
        heads,
        projection="embeddings_project",
        defaults={"embedding_size": 128, "summary_last_dropout": 0.1},
    )


def _modernbert() -> Family:
    pooled = {"pooler.dense": "head.dense", "pooler.norm": "head.norm"}
    pooling: dict[str, Any] = {
        "pooling": Pooling("gelu", has_norm=True),
        "dropout": "classifier_dropout_prob",
        "required": {"classifier_activation": "gelu"},
    }
    heads = {
        "BertModel": Head("ModernBertModel"),
        "BertForMaskedLM": Head(
            "ModernBertForMaskedLM",
            {
                "masked_lm.dense": "head.dense",
                "masked_lm.norm": "head.norm",
                "masked_lm.bias": "decoder.bias",
            },
            activation="gelu",
            tied=("decoder.weight",),
            required={"classifier_activation": "gelu"},
        ),
        "BertForSequenceClassification": Head(
            "ModernBertForSequenceClassification", {**pooled, **_CLASSIFIER}, **pooling
        ),
        "BertForTokenClassification": Head(
            "ModernBertForTokenClassification", {**pooled, **_CLASSIFIER}, **pooling
        ),
        "BertForQuestionAnswering": Head(
            "ModernBertForQuestionAnswering",
            {**pooled, "span.dense": "classifier"},
            **pooling,
            labels=False,
        ),
        "BertForMultipleChoice": Head(
            "ModernBertForMultipleChoice", {**pooled, **_CLASSIFIER}, **pooling, labels=False
        ),
    }
    return Family(
        "modernbert",
        "model.",
        {"word_embeddings": "embeddings.tok_embeddings", "norm": "embeddings.norm"},
        {
            "attention_norm": "attn_norm",
            "attention_output": "attn.Wo",
            "intermediate": "mlp.Wi",
            "output": "mlp.Wo",
            "output_norm": "mlp_norm",
        },
        "layers.{layer}.",
        heads,
        qkv=("attn.Wqkv",),
        fields={
            "hidden_act": "hidden_activation",
            "layer_norm_eps": "norm_eps",
            "attention_probs_dropout_prob": "attention_dropout",
            "hidden_dropout_prob": "embedding_dropout",
        },
        defaults={
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
            "pad_token_id": 50283,
            "max_position_embeddings": 8192,
        },
        has_segments=False,
        pre_norm=True,
        final_norm="final_norm",
    )


_ALL = (
    _bert(),
    _roberta("roberta", "Roberta"),
    _roberta("xlm-roberta", "XLMRoberta"),
    _distilbert(),
    _albert(),
    _electra(),
    _modernbert(),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in _ALL})


def family_of(model_type: str, where: str = "config") -> Family:
    """The family of a `model_type`.

    Raises:
        InputError: none of ours.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: model_type must be one of {known}, got {model_type!r}")
    return FAMILIES[model_type]


def head_of(model_type: str, name: str) -> Head:
    """One of our models in a family.

    Raises:
        InputError: the family has no such model.
    """
    heads = family_of(model_type).heads
    if name not in heads:
        raise InputError(
            f"{name}: not a model of family {model_type}, which has {', '.join(heads)}"
        )
    return heads[name]
