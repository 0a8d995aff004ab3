"""Utterances: what is wanted, and the slots that are filled, by one model (Chen et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import Line, counted
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import confusion_matrix
from fastbert.metrics.entities import OUTSIDE, entities, entity_scores, guess_scheme
from fastbert.models import BertModel, Targets
from fastbert.task_heads import IntentHead, WithHead, drawn, load_head
from fastbert.tasks.conll import Sentence, read_tagged
from fastbert.tasks.inference import softmax
from fastbert.tasks.labels import indices, label_set
from fastbert.tasks.losses import Loss, Shaping, at_least_one, class_loss
from fastbert.tasks.records import text_lines
from fastbert.tasks.saved import load_body
from fastbert.tasks.tag import sentence_of, words_of
from fastbert.tasks.tagging import entity_answers, predicted_tags, tag_loss, word_units
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

FILES = ("seq.in", "seq.out", "label")
ACCEPTED = f"a folder with {', '.join(FILES)}, or .jsonl with words, slots and intent"


@dataclass
class Intent(Task):
    """An intent an utterance and a slot tag a word."""

    name: ClassVar[str] = "intent"
    summary: ClassVar[str] = "what an utterance wants, and its slots, by one model"
    best_by: ClassVar[str] = "exact"
    noun: ClassVar[str] = "utterance"
    kept: ClassVar[tuple[str, ...]] = ("slots", "scheme", "slot_weight")

    slot_weight: float = option("of the slots' loss beside that of the intent", 1.0)
    slots: list[str] = field(default_factory=list, init=False)
    scheme: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.slot_weight < 0:
            raise InputError(f"--slot-weight must be at least 0, got {self.slot_weight}")

    def read(self, path: str, say: Say) -> list[Sentence]:
        folder = Path(path)
        if folder.is_dir():
            rows, layout = _read_folder(folder, self.encoding), ", ".join(FILES)
        else:
            found = read_tagged(folder, self.encoding)
            rows, layout = found.sentences, found.remarks
        bare = next((row for row in rows if row.intent is None), None)
        if bare is not None:
            raise InputError(f"{path}:{bare.line}: no intent; {ACCEPTED} is read")
        say(f"{path}: {counted(len(rows), 'utterance')}; {layout}")
        return rows

    def fit(self, rows: Sequence[Sentence], where: str = "training rows") -> None:
        self.labels = label_set([row.intent or "" for row in rows], where)
        self.scheme = guess_scheme(row.tags or () for row in rows)
        tags = {tag for row in rows for tag in row.tags or ()}
        self.slots = [OUTSIDE, *sorted(tags - {OUTSIDE})]

    def check(self, rows: Sequence[Sentence], where: str = "evaluation rows") -> None:
        """Intents and slots that training has not seen count as missed, as in ATIS."""

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        body, fresh = load_body(folder, self, dropout=dropout, seed=seed)
        head = IntentHead(body.config, len(self.labels), len(self.slots))
        return WithHead(body, drawn(head, body.config, seed)), [*fresh, "head"]

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        body = BertModel.from_pretrained(folder, config=config, new_heads=True)
        head = IntentHead(config, len(self.labels), len(self.slots))
        return WithHead(body, load_head(head, folder))

    def build(
        self,
        rows: Sequence[Sentence],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        units = word_units(rows, self.slots, tokenizer, length, 0, name=name, say=say)
        assert units.rows is not None
        index = {label: number for number, label in enumerate(self.labels)}
        known = np.array([index.get(row.intent or "", -100) for row in rows], dtype=np.int64)
        units.unit_labels = known[units.rows]
        return units

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        hidden_states = model.body.encoder(batch, rng)
        first = hidden_states[batch.first_tokens]
        pooler = model.body.pooler
        intents, slots = model.head(hidden_states, first if pooler is None else pooler(first), rng)
        return Outputs(sequences=intents, tokens=slots)

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and outputs.tokens is not None
        assert batch.unit_labels is not None
        wanted = class_loss(outputs.sequences, batch.unit_labels, shaping)
        slots = tag_loss(outputs.tokens, batch, Shaping(None, shaping.label_smoothing))
        total = wanted.total / at_least_one(targets.labelled)
        total = total + self.slot_weight * slots.total / at_least_one(targets.masked)
        return Loss(total, wanted.correct)

    def _tags(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> list[list[str]]:
        return predicted_tags(rows, units, raw.tokens or [], self.slots)

    def _intents(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> np.ndarray:
        """[rows, intents] logits: those of the first window of each."""
        assert raw.sequences is not None and units.rows is not None
        return raw.sequences[np.searchsorted(units.rows, np.arange(len(rows)))]

    def answers(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> list[dict[str, Any]]:
        out = []
        shares = softmax(self._intents(rows, units, raw))
        for row, tags, share in zip(rows, self._tags(rows, units, raw), shares, strict=True):
            best = int(share.argmax())
            out.append(
                {
                    **words_of(row),
                    "intent": self.labels[best],
                    "probability": round(float(share[best]), 6),
                    "slots": entity_answers(row, tags, self.scheme),
                    "tags": tags,
                    **({} if row.intent is None else {"true_intent": row.intent}),
                    **({} if row.tags is None else {"true_tags": list(row.tags)}),
                }
            )
        return out

    def is_right(self, row: Sentence, answer: dict[str, Any]) -> bool | None:
        return row.intent == answer["intent"] and list(row.tags or ()) == answer["tags"]

    def score(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> Scores:
        best = self._intents(rows, units, raw).argmax(axis=-1)
        right = np.array([self.labels[b] == r.intent for b, r in zip(best, rows, strict=True)])
        tagged = self._tags(rows, units, raw)
        said = [entities(tags, self.scheme) for tags in tagged]
        there = [entities(row.tags or (), self.scheme) for row in rows]
        found, table = entity_scores(said, there)
        same = np.array(
            [tags == list(row.tags or ()) for tags, row in zip(tagged, rows, strict=True)]
        )
        figures = {
            "intent_accuracy": float(right.mean()),
            "slot_f1": found["f1"],
            "slot_precision": found["precision"],
            "slot_recall": found["recall"],
            "exact": float((right & same).mean()),
        }
        known = np.array([row.intent in self.labels for row in rows])
        wanted = [row.intent or "" for row in rows if row.intent in self.labels]
        if not wanted:
            return Scores(figures, table)
        counts = confusion_matrix(best[known], indices(wanted, self.labels), len(self.labels))
        return Scores(figures, table, (counts, self.labels))

    def rank(self, figures: dict[str, float]) -> tuple[float, float]:
        return figures["exact"], figures["slot_f1"]

    def class_counts(self, units: Units) -> np.ndarray | None:
        assert units.unit_labels is not None
        return np.bincount(units.unit_labels, minlength=len(self.labels))

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Sentence]:
        return [sentence_of(*asked) for asked in zip(inputs, places, strict=True)]

    def show(self, row: Sentence) -> str:
        pairs = [f"{word}/{tag}" for word, tag in zip(row.words, row.tags or (), strict=True)]
        return f"{row.intent}: {' '.join(pairs)}"


def _read_folder(folder: Path, encoding: str) -> list[Sentence]:
    columns: list[list[Line]] = []
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no file {name}; {ACCEPTED} is read")
        lines = list(text_lines(folder / name, encoding))
        while lines and not lines[-1].text.strip():
            lines.pop()
        columns.append(lines)
    counts = [len(lines) for lines in columns]
    if len(set(counts)) > 1 or not counts[0]:
        shown = ", ".join(f"{name} {count:,}" for name, count in zip(FILES, counts, strict=True))
        raise InputError(f"{folder}: the files must have as many lines as one another, got {shown}")
    rows = []
    for text, slots, label in zip(*columns, strict=True):
        words, tags = text.text.split(), slots.text.split()
        if len(words) != len(tags) or not words:
            raise InputError(
                f"{folder / 'seq.out'}:{slots.number}: {counted(len(tags), 'tag')} for "
                f"{counted(len(words), 'word')}"
            )
        intent = label.text.strip()
        if not intent:
            raise InputError(f"{folder / 'label'}:{label.number}: the intent is empty")
        rows.append(Sentence(tuple(words), tuple(tags), text.number, intent=intent))
    return rows
