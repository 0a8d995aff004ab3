"""A saved model as a function: `pipeline("tag", "runs/ner")(["Ada lives in London."])`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, resolve_model
from fastbert.tasks.fill_mask import fill_mask
from fastbert.tasks.inference import TOKEN_BUDGET
from fastbert.tasks.registry import TASKS
from fastbert.tasks.saved import Saved
from fastbert.tokenizer import Tokenizer

FILL_MASK = "fill-mask"


@dataclass(frozen=True)
class Pipeline:
    """Answers of one fine-tuned model.

    Attributes:
        saved: model, tokenizer and task.
        dtype: of matrix products.
        token_budget: tokens a batch.
    """

    saved: Saved
    dtype: torch.dtype
    token_budget: int

    def __call__(self, inputs: Any) -> Any:
        """An answer for one input, or a list of them for a list.

        Args:
            inputs: a text, two texts as a tuple, or a dictionary as in a line of jsonl; or a list
                of any of them.

        Raises:
            InputError: an input that the task cannot read.
        """
        several = isinstance(inputs, list)
        answers = self.saved.ask(
            inputs if several else [inputs], dtype=self.dtype, token_budget=self.token_budget
        )
        return answers if several else answers[0]


@dataclass(frozen=True)
class FillMask:
    """Words for the blanks of texts, by a masked-LM head."""

    model: BertForMaskedLM
    tokenizer: Tokenizer

    def __call__(self, texts: str | Sequence[str], top: int = 5) -> Any:
        """For one text its blanks, each as words with probabilities; a list of them for a list."""
        one = isinstance(texts, str)
        found = fill_mask(
            self.model, self.tokenizer, [texts] if isinstance(texts, str) else list(texts), top
        )
        blanks = [[dict(blank.words) for blank in blanks] for blanks in found]
        return blanks[0] if one else blanks


def pipeline(
    task: str,
    model: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
) -> Pipeline | FillMask:
    """Load a model for a task.

    Args:
        task: a task of `fastbert finetune`, or "fill-mask".
        model: a run, or a model folder, also one of transformers.
        device: None for the first GPU, or else the CPU.
        dtype: of matrix products.
        token_budget: tokens a batch.

    Raises:
        InputError: no such task, no such model, or a model of another task.
    """
    known = [*TASKS, FILL_MASK]
    if task not in known:
        raise InputError(f"pipeline: task must be one of {', '.join(known)}, got {task!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if task == FILL_MASK:
        folder = resolve_model(Path(model))
        found = BertForMaskedLM.from_pretrained(folder).to(device)
        return FillMask(found, Tokenizer.from_pretrained(folder))
    saved = Saved.from_pretrained(model, device)
    if saved.task.name != task:
        raise InputError(f"pipeline: {model} was trained for {saved.task.name}, not {task}")
    return Pipeline(saved, dtype, token_budget)
