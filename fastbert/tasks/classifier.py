"""A saved classifier: its model, its tokenizer, and what config.json has no field for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastbert.checkpoint import NameMap, stored_shapes
from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertForSequenceClassification, BertModel, resolve_model
from fastbert.tokenizer import Tokenizer

TASK_FILE = "task.json"
# tokens a sequence; `finetune` takes no fewer either
SHORTEST = 8


@dataclass(frozen=True)
class TaskFacts:
    """What config.json has no field for, written beside it.

    Attributes:
        pair: whether the model was trained on pairs of texts.
        max_seq_len: tokens a sequence in training; None for the model's positions.
    """

    pair: bool = False
    max_seq_len: int | None = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `task.json`."""
        with atomic_write(Path(folder) / TASK_FILE) as file:
            json.dump({"task": "classify", **asdict(self)}, file, indent=2)
            file.write("\n")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> TaskFacts:
        """Read `task.json`; a folder without one holds a classifier of single texts."""
        path = Path(folder) / TASK_FILE
        if not path.is_file():
            return cls()
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            facts = cls(raw["pair"], raw["max_seq_len"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: unreadable: {error}") from None
        if not isinstance(facts.pair, bool):
            raise InputError(f"{path}: pair must be true or false, got {facts.pair!r}")
        return facts

    def refuse_unfit(self, folder: str | os.PathLike[str], config: EncoderConfig) -> None:
        """Hold `max_seq_len` against the model's positions.

        Raises:
            InputError: no whole number, too few tokens for text, or more than there are positions.
        """
        positions = config.max_seqlen
        # a model may have fewer positions than that, and is then trained on all of them
        least = min(SHORTEST, positions)
        length = self.max_seq_len
        # bool is a kind of int
        whole = isinstance(length, int) and not isinstance(length, bool)
        if length is not None and not (whole and least <= length <= positions):
            raise InputError(
                f"{Path(folder) / TASK_FILE}: max_seq_len must be a whole number from {least} to "
                f"the model's {positions} positions, got {length!r}"
            )


@dataclass(frozen=True)
class Classifier:
    """A model with all that is needed to ask it."""

    model: BertForSequenceClassification
    tokenizer: Tokenizer
    facts: TaskFacts

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Classifier:
        """Load a run of `finetune classify`, or a model folder, also one of transformers.

        Raises:
            InputError: no model, no classifier, or broken files.
        """
        folder = resolve_model(path)
        config = EncoderConfig.from_pretrained(folder)
        config.labels = config.labels or _unnamed_labels(folder, config)
        facts = TaskFacts.read(folder)
        facts.refuse_unfit(folder, config)
        tokenizer = Tokenizer.from_pretrained(folder)
        refuse_foreign_tokenizer(tokenizer.vocab_size, config, str(folder))
        model = BertForSequenceClassification.from_pretrained(folder, config=config)
        return cls(model, tokenizer, facts)


def load_for_labels(
    folder: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    dropout: float | None = None,
    seed: int = 0,
) -> tuple[BertForSequenceClassification, list[str]]:
    """A saved model with a head for these labels: its own if it has the same, else a fresh one.

    Args:
        folder: of a model of any kind.
        labels: the label set.
        dropout: of the encoder, and of the head unless config.json has one for it; None for the
            saved model's.
        seed: of fresh weights.

    Returns:
        The model, and which of pooler and classifier are fresh.

    Raises:
        InputError: missing, damaged or foreign files.
    """
    saved = EncoderConfig.from_pretrained(folder)
    config = dataclasses.replace(saved, labels=list(labels))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    if saved.labels == config.labels:
        model = BertForSequenceClassification.from_pretrained(
            folder, config=config, new_heads=True, seed=seed
        )
        return model, _parts(model)
    # another task's head may have another shape, or the same shape and another meaning
    body = BertModel.from_pretrained(folder, config=config, new_heads=True, seed=seed)
    model = BertForSequenceClassification.from_config(config, seed)
    model.load_state_dict(body.state_dict(), strict=False)
    return model, [*_parts(body), "classifier"]


def _parts(model: Any) -> list[str]:
    """Modules with weights that the folder lacked."""
    return sorted({name.partition(".")[0] for name in model.fresh_parameters}, reverse=True)


def _unnamed_labels(folder: Path, config: EncoderConfig) -> list[str]:
    """Transformers leaves names out of config.json where nobody gave any."""
    names = NameMap.of(config, BertForSequenceClassification.name)
    stored = names.theirs("classifier.dense.weight", prefixed=False)[0]
    shapes = names.canonical(stored_shapes(folder))
    if stored not in shapes:
        raise InputError(
            f"{folder}: not a classifier: config.json names no labels; "
            "`fastbert finetune classify` makes one"
        )
    return [f"LABEL_{number}" for number in range(shapes[stored][0])]
