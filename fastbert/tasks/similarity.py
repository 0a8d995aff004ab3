"""How alike two texts are, on the scale of the training file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.correlation import pearson, spearman
from fastbert.models import BertForSequenceClassification, BertModel, Targets
from fastbert.tasks.columns import SCORES
from fastbert.tasks.losses import Loss, Shaping, at_least_one, squared_loss
from fastbert.tasks.pairs import PairTask, pair_units
from fastbert.tasks.pooling import pool_tokens
from fastbert.tasks.saved import load_body
from fastbert.tasks.sequences import join_cut, say_share
from fastbert.tasks.table import Row, read_table
from fastbert.tasks.task import Outputs, Raw, Say, Scores, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

MANNERS = ("regression", "cosine")
# an answer is called right where it is off by less than this share of the scale
_NEAR = 0.1


@dataclass
class Similarity(PairTask):
    """A score a pair: one number from both texts together, or the cosine of their vectors."""

    name: ClassVar[str] = "similarity"
    summary: ClassVar[str] = "a score a pair of texts"
    best_by: ClassVar[str] = "spearman"
    noun: ClassVar[str] = "pair"
    kept: ClassVar[tuple[str, ...]] = (
        "manner",
        "low",
        "high",
        "text_column",
        "pair_column",
        "score_column",
        "columns",
        "quoting",
    )

    score_column: str | None = option("guessed from the names")
    manner: str = option("regression over both texts, or cosine of a vector each", "regression")
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        self.pair = True
        if self.manner not in MANNERS:
            raise InputError(f"--manner must be one of {', '.join(MANNERS)}, got {self.manner!r}")

    @property
    def shaped_by(self) -> tuple[str, ...]:
        return ()

    @property
    def has_head(self) -> bool:
        return self.manner == "regression"

    def read(self, path: str, say: Say) -> list[Row]:
        table = read_table(
            path,
            text_column=self.text_column,
            pair_column=self.pair_column,
            label_column=self.score_column,
            label_names=SCORES,
            form=self.form,
        )
        if table.columns.pair is None:
            raise InputError(f"{path}: one text a row; --pair-column names the second one")
        self.text_column, self.pair_column = table.columns.text, table.columns.pair
        self.score_column = table.columns.label
        say(table.describe().replace("--label-column", "--score-column"))
        for row in table.rows:
            _score(row, f"{path}:{row.line}", self.score_column)
        return table.rows

    def fit(self, rows: Sequence[Row], where: str = "training rows") -> None:
        scores = [_score(row, where) for row in rows]
        self.low, self.high = min(scores), max(scores)
        self.labels = ["score"]
        if self.low == self.high:
            raise InputError(f"{where}: every score is {self.low:g}; nothing can be learnt")

    def check(self, rows: Sequence[Row], where: str = "evaluation rows") -> None:
        if len(rows) < 2:
            raise InputError(f"{where}: a correlation needs at least 2 pairs")

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        if self.manner == "cosine":
            return load_body(folder, self, dropout=dropout, seed=seed)
        model, fresh = self.load_classifier(folder, dropout, seed)
        if "classifier" in fresh:
            # the scale's middle is a better guess than 0
            nn.init.constant_(model.classifier.dense.bias, (self.low + self.high) / 2)
        return model, fresh

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        if self.manner == "cosine":
            return BertModel.from_pretrained(folder, config=config, new_heads=True)
        config.labels = config.labels[:1] or ["score"]
        return BertForSequenceClassification.from_pretrained(folder, config=config)

    def save_model(self, model: Any, folder: Path) -> None:
        if self.manner == "cosine":
            model.save_pretrained(folder)
        else:
            self.save_classifier(model, folder, "regression")

    def build(
        self, rows: Sequence[Row], tokenizer: Tokenizer, *, name: str = "", say: Say | None = None
    ) -> Units:
        length = self.max_seq_len or 512
        if self.manner == "cosine":
            units = two_sequences(rows, tokenizer, length, name, say)
        else:
            units = pair_units(rows, tokenizer, length, name=name, say=say)
        if all(row.label for row in rows):
            units.values = np.array([[float(row.label)] for row in rows], dtype=np.float32)
        return units

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        if self.manner == "regression":
            return Outputs(sequences=model(batch, rng=rng).logits)
        vectors = pool_tokens(model.encoder(batch, rng), batch, "mean")
        return Outputs(sequences=nn.functional.normalize(vectors.float(), dim=-1))

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and batch.values is not None
        found = outputs.sequences.float()
        if self.manner == "cosine":
            cosine = (found[0::2] * found[1::2]).sum(dim=-1)
            numbers = self.low + cosine * (self.high - self.low)
        else:
            numbers = found.squeeze(-1)
        spread = self.high - self.low
        # in shares of the scale, so that its unit does not matter
        loss = squared_loss(numbers / spread, batch.values.squeeze(-1) / spread, _NEAR)
        return Loss(loss.total / at_least_one(targets.labelled), loss.correct)

    def numbers(self, raw: Raw) -> np.ndarray:
        """[pairs] float64 scores."""
        assert raw.sequences is not None
        found = raw.sequences.astype(np.float64)
        if self.manner == "regression":
            return found[:, 0]
        cosine = (found[0::2] * found[1::2]).sum(axis=-1)
        return self.low + cosine * (self.high - self.low)

    def answers(self, rows: Sequence[Row], units: Units, raw: Raw) -> list[dict[str, Any]]:
        return [
            {
                "text": row.text,
                "second": row.second,
                "score": round(float(score), 6),
                **({"true_score": float(row.label)} if row.label else {}),
            }
            for row, score in zip(rows, self.numbers(raw), strict=True)
        ]

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        return f"{answer['score']:.4f}\t{line}"

    def score(self, rows: Sequence[Row], units: Units, raw: Raw) -> Scores:
        found, true = self.numbers(raw), np.array([float(row.label) for row in rows])
        error = float(np.square(found - true).mean())
        return Scores(
            {"spearman": spearman(found, true), "pearson": pearson(found, true), "mse": error}
        )

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Row]:
        return self.rows_of_texts(inputs, places)


def two_sequences(
    rows: Sequence[Row], tokenizer: Tokenizer, length: int, name: str, say: Say | None
) -> Units:
    """Both texts of a pair as sequences of their own; a unit is both."""
    texts = [text for row in rows for text in (row.text, row.second or "")]
    joined = [join_cut(tokenizer, ids, None, length) for ids in tokenizer.encode_batch(texts)]
    cut = sum(was_cut for _, was_cut in joined)
    say_share(say, name, cut, len(texts), "text", f"cut to {length} tokens")
    return Units(
        [one.input_ids for one, _ in joined],
        [one.token_type_ids for one, _ in joined],
        cu_units=np.arange(0, len(texts) + 1, 2),
    )


def _score(row: Row, where: str, column: str = "score") -> float:
    try:
        value = float(row.label)
    except ValueError:
        value = float("nan")
    if not math.isfinite(value):
        raise InputError(f"{where}: field {column!r} must be a number, got {row.label!r}")
    return value
