"""Reranking: how well a passage answers a query, from both texts together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.ranking import ranking_scores
from fastbert.models import BertForSequenceClassification, Targets
from fastbert.tasks.candidates import Candidates, deal_candidates
from fastbert.tasks.inference import sigmoid
from fastbert.tasks.losses import Loss, Shaping, at_least_one, binary_loss, choice_loss
from fastbert.tasks.pairs import PairTask, pair_units
from fastbert.tasks.records import Record, read_records, text_field
from fastbert.tasks.sequences import say_share
from fastbert.tasks.table import Row, read_table
from fastbert.tasks.task import Outputs, Raw, Say, Scores, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

ACCEPTED = (
    "query, passage and label (0 or more: how relevant) in .tsv, .csv or .jsonl; or .jsonl with "
    "query, passages and labels, or query, positives and negatives"
)
# losses: a softmax over a relevant passage and irrelevant ones of its query (Gao et al. 2021,
# arXiv:2101.08751), or each passage by itself
MANNERS = ("lists", "passages")
_POSITIVES, _NEGATIVES = ("positives", "positive", "pos"), ("negatives", "negative", "neg")


@dataclass
class Rerank(PairTask):
    """A relevance a query and passage, to order a query's passages by.

    Attributes:
        odds: relevant passages over others, among the training rows.
    """

    name: ClassVar[str] = "rerank"
    summary: ClassVar[str] = "how relevant a passage is to a query"
    best_by: ClassVar[str] = "ndcg_at_10"
    noun: ClassVar[str] = "passage"
    parts: ClassVar[str] = "lists"
    kept: ClassVar[tuple[str, ...]] = (
        "manner",
        "text_column",
        "pair_column",
        "label_column",
        "columns",
        "quoting",
    )

    label_column: str | None = option("how relevant; guessed from the names")
    manner: str = option(
        "learn from lists, a relevant passage against irrelevant ones of its query, or from "
        "passages one by one",
        "lists",
    )
    negatives: int = option("irrelevant passages a list at most", 7)
    odds: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        self.pair = True
        if self.manner not in MANNERS:
            raise InputError(f"--manner must be one of {', '.join(MANNERS)}, got {self.manner!r}")
        if self.negatives < 1:
            raise InputError(f"--negatives must be at least 1, got {self.negatives}")

    @property
    def shaped_by(self) -> tuple[str, ...]:
        return ("label_smoothing",)

    def read(self, path: str, say: Say) -> list[Row]:
        lists = None
        if path.lower().endswith((".jsonl", ".jsonl.gz")):
            records = read_records(Path(path), self.form)
            lists = list(_listed(path, records.rows)) if _is_listed(records.rows[0]) else None
        if lists is not None:
            rows, layout = lists, "lists of passages"
        else:
            table = read_table(
                path,
                text_column=self.text_column,
                pair_column=self.pair_column,
                label_column=self.label_column,
                label_names=("label", "relevance", "score", "gain"),
                form=self.form,
            )
            if table.columns.pair is None:
                raise InputError(f"{path}: no column of passages; {ACCEPTED} are read")
            self.text_column, self.pair_column = table.columns.text, table.columns.pair
            self.label_column = table.columns.label
            rows, layout = table.rows, table.describe().partition(": ")[2]
        for row in rows:
            _gain(row, f"{path}:{row.line}")
        queries = len({row.text for row in rows})
        asked = "1 query" if queries == 1 else f"{queries:,} queries"
        say(f"{path}: {counted(len(rows), 'passage')} of {asked}; {layout}")
        return rows

    def fit(self, rows: Sequence[Row], where: str = "training rows") -> None:
        self.labels = ["relevance"]
        self.check(rows, where)
        relevant = sum(_gain(row, where) > 0 for row in rows)
        if relevant == len(rows):
            raise InputError(f"{where}: every passage is relevant; others are needed too")
        self.odds = relevant / (len(rows) - relevant)
        if self.manner == "lists" and not self._lists(rows, where):
            raise InputError(
                f"{where}: no query has a relevant passage and an irrelevant one; "
                "--manner passages learns from each alone"
            )

    def examples(self, rows: Sequence[Row], where: str, say: Say) -> Sequence[Row | Candidates]:
        if self.manner == "passages":
            return rows
        lists = self._lists(rows, where)
        left_out = len(rows) - len({number for one in lists for number in one.numbers})
        what = f"in no list: more than --negatives {self.negatives} take, or no other kind beside"
        say_share(say, where, left_out, len(rows), "passage", what)
        return lists

    def units_a_step(self, batch_size: int) -> int:
        if self.manner == "passages":
            return batch_size
        return max(batch_size // (1 + self.negatives), 1)

    def _lists(self, rows: Sequence[Row], where: str) -> list[Candidates]:
        return deal_candidates(rows, [_gain(row, where) for row in rows], self.negatives)

    def check(self, rows: Sequence[Row], where: str = "evaluation rows") -> None:
        if not any(_gain(row, where) > 0 for row in rows):
            raise InputError(f"{where}: no passage is relevant")

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        model, fresh = self.load_classifier(folder, dropout, seed)
        if "classifier" in fresh:
            # the log-odds of any passage at all (Lin et al. 2017, section 4.1): from 0 the whole
            # model moves until it says "not relevant" throughout, and stays there
            nn.init.constant_(model.classifier.dense.bias, math.log(self.odds))
        return model, fresh

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        config.labels = config.labels[:1] or ["relevance"]
        return BertForSequenceClassification.from_pretrained(folder, config=config)

    def build(
        self,
        rows: Sequence[Row | Candidates],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        lists = [row for row in rows if isinstance(row, Candidates)]
        if lists:
            listed = [row for one in lists for row in one.rows]
            units = pair_units(listed, tokenizer, length, name=name, say=say)
            return Units(
                units.input_ids,
                units.token_type_ids,
                cu_units=np.cumsum([0, *(len(one.rows) for one in lists)]),
                rows=np.concatenate([one.numbers for one in lists]),
                # the relevant passage comes first
                unit_labels=np.zeros(len(lists), dtype=np.int64),
            )
        passages = [row for row in rows if isinstance(row, Row)]
        units = pair_units(passages, tokenizer, length, name=name, say=say)
        if all(row.label for row in passages):
            gains = np.array([[float(row.label)] for row in passages], dtype=np.float32)
            units.values = (gains > 0).astype(np.float32)
        return units

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        return Outputs(sequences=model(batch, rng=rng).logits)

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and batch.cu_units is not None
        if batch.unit_labels is not None:
            scores = outputs.sequences.squeeze(-1)
            found = choice_loss(scores, batch.cu_units, batch.unit_labels, shaping)
        else:
            assert batch.values is not None
            found = binary_loss(outputs.sequences, batch.values, shaping)
        return Loss(found.total / at_least_one(targets.labelled), found.correct)

    def answers(self, rows: Sequence[Row], units: Units, raw: Raw) -> list[dict[str, Any]]:
        assert raw.sequences is not None
        return [
            {
                "query": row.text,
                "passage": row.second,
                "relevance": round(float(share), 6),
                "score": round(float(logit), 6),
                **({"true_gain": float(row.label)} if row.label else {}),
            }
            for row, share, logit in zip(
                rows, sigmoid(raw.sequences[:, 0]), raw.sequences[:, 0], strict=True
            )
        ]

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        return f"{answer['relevance']:.4f}\t{line}"

    def is_right(self, row: Row, answer: dict[str, Any]) -> bool | None:
        if self.manner == "lists":
            # differences between a query's passages were learnt, not whether one is relevant
            return None
        return (answer["relevance"] > 0.5) == (float(row.label) > 0)

    def score(self, rows: Sequence[Row], units: Units, raw: Raw) -> Scores:
        assert raw.sequences is not None
        logits = raw.sequences[:, 0]
        figures = order_figures(rows, logits)
        if self.manner == "passages":
            assert units.values is not None
            figures["accuracy"] = float(((logits > 0) == (units.values[:, 0] > 0.5)).mean())
        return Scores(figures)

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Row]:
        return self.rows_of_texts(inputs, places)


def order_figures(rows: Sequence[Row], scores: np.ndarray) -> dict[str, float]:
    """ndcg_at_10 and mrr_at_10 of each query's passages by [rows] scores, the greatest first."""
    by_query: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_query.setdefault(row.text, []).append(number)
    ranked, gains = {}, {}
    for query, numbers in by_query.items():
        order = sorted(numbers, key=lambda number: -scores[number])
        ranked[query] = [str(number) for number in order]
        gains[query] = {str(number): float(rows[number].label) for number in numbers}
    figures = ranking_scores(ranked, gains)
    return {name: figures[name] for name in ("ndcg_at_10", "mrr_at_10")}


def _gain(row: Row, where: str) -> float:
    try:
        gain = float(row.label)
    except ValueError:
        gain = math.nan
    if not math.isfinite(gain):
        raise InputError(
            f"{where}: the label must be a number, how relevant the passage is, got {row.label!r}"
        )
    return gain


def _is_listed(record: Record) -> bool:
    names = ("passages", *_POSITIVES)
    return any(isinstance(record.fields.get(name), list) for name in names)


def _listed(path: str, records: Sequence[Record]) -> Iterator[Row]:
    for record in records:
        where, fields = f"{path}:{record.line}", record.fields
        query = text_field(where, fields, "query")
        if "passages" in fields:
            passages, labels = fields["passages"], fields.get("labels")
            if not isinstance(labels, list) or len(labels) != len(passages):
                raise InputError(f"{where}: passages and labels must be lists of one length")
            found = list(zip(passages, labels, strict=True))
        else:
            found = [
                (passage, gain)
                for names, gain in ((_POSITIVES, 1), (_NEGATIVES, 0))
                for name in names
                for passage in _list(where, fields, name)
            ]
        for passage, gain in found:
            if not isinstance(passage, str):
                raise InputError(f"{where}: a passage must be text, got {passage!r:.60}")
            yield Row(query, str(gain), passage, record.line)


def _list(where: str, fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise InputError(f"{where}: field {name!r} must be a list of passages")
    return value
