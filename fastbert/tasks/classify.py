"""Classification of texts and pairs of texts: one class each, or any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import (
    accuracy,
    confusion_matrix,
    macro_f1,
    majority,
    matthews,
    multi_label_scores,
    per_class,
    per_label,
)
from fastbert.models import BertForSequenceClassification, Targets
from fastbert.tasks.inference import log_softmax, sigmoid, softmax
from fastbert.tasks.labels import check_labels, indices, label_set, ordered
from fastbert.tasks.losses import Loss, Shaping, at_least_one, binary_loss, class_loss, pool_units
from fastbert.tasks.pairs import PairTask, pair_units
from fastbert.tasks.table import Row, read_table
from fastbert.tasks.task import Outputs, Raw, Say, Scores, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

LONG_TEXT = ("first", "mean", "max")


@dataclass
class Classify(PairTask):
    """One class a text, or pair of texts; with `multi_label` any number of labels."""

    name: ClassVar[str] = "classify"
    summary: ClassVar[str] = "one class a text, or pair of texts; or any number of labels"
    best_by: ClassVar[str] = "accuracy"
    kept: ClassVar[tuple[str, ...]] = (
        "pair",
        "multi_label",
        "label_separator",
        "long_text",
        "stride",
        "text_column",
        "pair_column",
        "label_column",
        "columns",
        "quoting",
    )

    label_column: str | None = option("guessed from the names")
    multi_label: bool = option("any number of labels a text, scored by micro-F1", False)
    label_separator: str = option("between the labels of a text, with --multi-label", ",")
    long_text: str = option(
        "of a text longer than the model: first part alone, or mean or max over windows", "first"
    )
    stride: int = option("tokens that neighbouring windows share", 64)

    def __post_init__(self) -> None:
        if self.long_text not in LONG_TEXT:
            raise InputError(
                f"--long-text must be one of {', '.join(LONG_TEXT)}, got {self.long_text!r}"
            )
        if self.multi_label and not self.label_separator:
            raise InputError("--label-separator must not be empty")

    def read(self, path: str, say: Say) -> list[Row]:
        table = read_table(
            path,
            text_column=self.text_column,
            pair_column=self.pair_column,
            label_column=self.label_column,
            label_separator=self.label_separator if self.multi_label else None,
            form=self.form,
        )
        # other files are read as the first one
        self.text_column, self.label_column = table.columns.text, table.columns.label
        self.pair_column = table.columns.pair or ""
        say(table.describe())
        return table.rows

    def fit(self, rows: Sequence[Row], where: str = "training rows") -> None:
        self.pair = any(row.second is not None for row in rows)
        if self.multi_label:
            self.labels = ordered({label for row in rows for label in row.labels})
            if len(self.labels) < 2:
                raise InputError(
                    f"{where}: at least 2 different labels are needed, found {len(self.labels)} "
                    f"({', '.join(self.labels)})"
                )
        else:
            remedy = "; --label-column names another column"
            self.labels = label_set([row.label for row in rows], where, remedy)

    def check(self, rows: Sequence[Row], where: str = "evaluation rows") -> None:
        named = [
            (row.line, label)
            for row in rows
            for label in (row.labels if self.multi_label else (row.label,))
        ]
        check_labels(named, self.labels, where)

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        return self.load_classifier(folder, dropout, seed)

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        config.labels = list(self.labels)
        return BertForSequenceClassification.from_pretrained(folder, config=config)

    def restore(self, facts: dict[str, Any], config: EncoderConfig, where: str) -> None:
        super().restore(facts, config, where)
        self.labels = self.labels or self.unnamed_labels(Path(where).parent)

    def save_model(self, model: Any, folder: Path) -> None:
        kind = "multi_label_classification" if self.multi_label else "single_label_classification"
        self.save_classifier(model, folder, kind)

    def build(
        self, rows: Sequence[Row], tokenizer: Tokenizer, *, name: str = "", say: Say | None = None
    ) -> Units:
        units = pair_units(
            rows,
            tokenizer,
            self.max_seq_len or 512,
            windowed=self.long_text != "first",
            stride=self.stride,
            name=name,
            say=say,
        )
        if self.multi_label and all(set(row.labels) <= set(self.labels) for row in rows):
            units.values = np.array(
                [[label in row.labels for label in self.labels] for row in rows], dtype=np.float32
            ).reshape(len(rows), len(self.labels))
        elif not self.multi_label and all(row.label in self.labels for row in rows):
            units.unit_labels = indices((row.label for row in rows), self.labels)
        return units

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        logits = model(batch, rng=rng).logits
        if self.long_text == "first" or batch.cu_units is None:
            return Outputs(sequences=logits)
        return Outputs(sequences=pool_units(logits, batch.cu_units, self.long_text), pooled=True)

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None
        if self.multi_label:
            assert batch.values is not None
            found = binary_loss(outputs.sequences, batch.values, shaping)
        else:
            assert batch.unit_labels is not None
            found = class_loss(outputs.sequences, batch.unit_labels, shaping)
        return Loss(found.total / at_least_one(targets.labelled), found.correct)

    def answers(self, rows: Sequence[Row], units: Units, raw: Raw) -> list[dict[str, Any]]:
        if raw.sequences is None:
            return []
        shares = (sigmoid if self.multi_label else softmax)(raw.sequences)
        return [
            {**_texts(row), **self._answer(share), **self._truth(row)}
            for row, share in zip(rows, shares, strict=True)
        ]

    def _answer(self, shares: np.ndarray) -> dict[str, Any]:
        probabilities = {
            label: round(float(share), 6) for label, share in zip(self.labels, shares, strict=True)
        }
        if self.multi_label:
            chosen = [
                label for label, share in zip(self.labels, shares, strict=True) if share > 0.5
            ]
            return {"labels": chosen, "probabilities": probabilities}
        best = int(shares.argmax())
        return {
            "label": self.labels[best],
            "probability": probabilities[self.labels[best]],
            "probabilities": probabilities,
        }

    def _truth(self, row: Row) -> dict[str, Any]:
        if self.multi_label:
            return {"true_labels": list(row.labels)} if row.line else {}
        return {"true_label": row.label} if row.label else {}

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        if self.multi_label:
            return None
        return f"{answer['label']}\t{answer['probability']:.4f}\t{line}"

    def is_right(self, row: Row, answer: dict[str, Any]) -> bool | None:
        if self.multi_label:
            return sorted(answer["labels"]) == sorted(row.labels)
        return bool(answer["label"] == row.label)

    def score(self, rows: Sequence[Row], units: Units, raw: Raw) -> Scores:
        assert raw.sequences is not None
        if self.multi_label:
            assert units.values is not None
            chosen, there = raw.sequences > 0, units.values > 0.5
            return Scores(multi_label_scores(chosen, there), per_label(chosen, there, self.labels))
        assert units.unit_labels is not None
        labels, predicted = units.unit_labels, raw.sequences.argmax(axis=-1)
        right = np.take_along_axis(log_softmax(raw.sequences), labels[:, None], axis=-1)
        figures = {
            "accuracy": accuracy(predicted, labels),
            "macro_f1": macro_f1(predicted, labels),
            "mcc": matthews(predicted, labels),
            "majority": majority(labels),
            "loss": float(-right.mean()),
        }
        table = confusion_matrix(predicted, labels, len(self.labels))
        return Scores(figures, per_class(predicted, labels, self.labels), (table, self.labels))

    def rank(self, figures: dict[str, float]) -> tuple[float, float]:
        if self.multi_label:
            return figures["micro_f1"], figures["exact"]
        return super().rank(figures)

    def summarise(self, figures: dict[str, float]) -> str:
        if self.multi_label:
            return super().summarise(figures)
        return (
            f"accuracy {figures['accuracy']:.1%}, macro-F1 {figures['macro_f1']:.1%} "
            f"(majority {figures['majority']:.1%})"
        )

    def class_counts(self, units: Units) -> np.ndarray | None:
        if self.multi_label:
            assert units.values is not None
            return units.values.sum(axis=0)
        assert units.unit_labels is not None
        return np.bincount(units.unit_labels, minlength=len(self.labels))

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Row]:
        return self.rows_of_texts(inputs, places)


def _texts(row: Row) -> dict[str, Any]:
    return {"text": row.text, **({} if row.second is None else {"second": row.second})}
