"""What adapter libraries are told of our models."""

from __future__ import annotations

import sys

# a model type of its own: our modules are named otherwise than transformers' of the same family
MODEL_TYPE = "fastbert"
# which of our projections LoRA adapts where nobody says: peft's choice for BERT, and the output
LORA_TARGETS = ["qkv", "attention_output"]


def offer_targets() -> None:
    """Enter LORA_TARGETS into peft's table, where peft is imported."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is not None:
        table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        table.setdefault(MODEL_TYPE, list(LORA_TARGETS))
