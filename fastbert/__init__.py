"""fastbert: the fastest exact BERT for people who train, fine-tune and serve encoders."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# read where they are asked for, so that importing the package stays cheap
_HOMES = {
    "BertForMaskedLM": "models",
    "BertForMultipleChoice": "models",
    "BertForNextSentencePrediction": "models",
    "BertForPreTraining": "models",
    "BertForQuestionAnswering": "models",
    "BertForReplacedTokenDetection": "models",
    "BertForSequenceClassification": "models",
    "BertForTokenClassification": "models",
    "BertModel": "models",
    "EncoderConfig": "config",
    "LORA_TARGETS": "adapters",
    "PackedBatch": "packing",
    "Tokenizer": "tokenizer",
    "accelerate": "dropin",
    "pipeline": "pipelines",
    "register_attention": "attention_interface",
    "restore": "dropin",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastbert.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
