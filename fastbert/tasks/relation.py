"""Relations between two marked entities of a sentence, by the states of their markers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import confusion_matrix, majority
from fastbert.metrics.relations import relation_scores
from fastbert.models import BertModel, Targets
from fastbert.task_heads import RelationHead, WithHead, drawn, load_head
from fastbert.tasks.inference import softmax
from fastbert.tasks.labels import check_labels, indices, label_set
from fastbert.tasks.losses import Loss, Shaping, at_least_one, class_loss
from fastbert.tasks.saved import load_body
from fastbert.tasks.semeval import Marked, marked_of, read_marked, unmark
from fastbert.tasks.sequences import encode, join, room, say_share
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

# around the first entity and around the second, as R-BERT has them (Wu and He 2019)
MARKERS = ("$", "#")


@dataclass
class Relation(Task):
    """One relation a sentence, between the two entities that are marked in it."""

    name: ClassVar[str] = "relation"
    summary: ClassVar[str] = "the relation between two marked entities"
    best_by: ClassVar[str] = "macro_f1"
    noun: ClassVar[str] = "sentence"

    def read(self, path: str, say: Say) -> list[Marked]:
        rows, layout = read_marked(Path(path), self.encoding)
        say(f"{path}: {counted(len(rows), 'sentence')}; {layout}")
        return rows

    def fit(self, rows: Sequence[Marked], where: str = "training rows") -> None:
        self.labels = label_set([row.label for row in rows], where)

    def check(self, rows: Sequence[Marked], where: str = "evaluation rows") -> None:
        check_labels(((row.line, row.label) for row in rows), self.labels, where)

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        body, fresh = load_body(folder, self, dropout=dropout, seed=seed)
        head = drawn(RelationHead(body.config, len(self.labels)), body.config, seed)
        return WithHead(body, head), [*fresh, "head"]

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        body = BertModel.from_pretrained(folder, config=config, new_heads=True)
        return WithHead(body, load_head(RelationHead(config, len(self.labels)), folder))

    def build(
        self,
        rows: Sequence[Marked],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        ids, types, places, cut = [], [], [], 0
        for row, encoded in zip(rows, encode(tokenizer, [r.text for r in rows]), strict=True):
            tokens, starts = with_markers(row, encoded.ids, encoded.offsets, tokenizer)
            kept = _window(starts, len(tokens), room(tokenizer, False, length))
            cut += kept[1] - kept[0] < len(tokens)
            joined = join(tokenizer, tokens[kept[0] : kept[1]])
            ids.append(joined.input_ids)
            types.append(joined.token_type_ids)
            # an entity that did not fit is stood for by what is nearest
            inside = np.clip(starts - kept[0], 0, max(kept[1] - kept[0] - 1, 0))
            places.append(inside + joined.first)
        say_share(
            say, name, cut, len(rows), "sentence", f"cut around its entities to {length} tokens"
        )
        labels = None
        if all(row.label in self.labels for row in rows):
            labels = indices((row.label for row in rows), self.labels)
        return Units(ids, types, places=np.array(places).reshape(-1, 2), unit_labels=labels)

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        hidden_states = model.body.encoder(batch, rng)
        return Outputs(sequences=model.head(hidden_states, batch.places, rng))

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and batch.unit_labels is not None
        found = class_loss(outputs.sequences, batch.unit_labels, shaping)
        return Loss(found.total / at_least_one(targets.labelled), found.correct)

    def answers(self, rows: Sequence[Marked], units: Units, raw: Raw) -> list[dict[str, Any]]:
        assert raw.sequences is not None
        out = []
        for row, shares in zip(rows, softmax(raw.sequences), strict=True):
            best = int(shares.argmax())
            out.append(
                {
                    "text": row.text,
                    "head": row.text[slice(*row.first)],
                    "tail": row.text[slice(*row.second)],
                    "label": self.labels[best],
                    "probability": round(float(shares[best]), 6),
                    **({"true_label": row.label} if row.label else {}),
                }
            )
        return out

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        return f"{answer['label']}\t{answer['probability']:.4f}\t{line}"

    def is_right(self, row: Marked, answer: dict[str, Any]) -> bool | None:
        return bool(row.label == answer["label"])

    def score(self, rows: Sequence[Marked], units: Units, raw: Raw) -> Scores:
        assert raw.sequences is not None
        said = raw.sequences.argmax(axis=-1)
        there = indices((row.label for row in rows), self.labels)
        figures, table = relation_scores(
            [self.labels[number] for number in said], [row.label for row in rows]
        )
        figures["majority"] = majority(there)
        counts = confusion_matrix(said, there, len(self.labels))
        return Scores(figures, table, (counts, self.labels))

    def class_counts(self, units: Units) -> np.ndarray | None:
        assert units.unit_labels is not None
        return np.bincount(units.unit_labels, minlength=len(self.labels))

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Marked]:
        return [
            unmark(given, place) if isinstance(given, str) else marked_of(given, place)
            for given, place in zip(inputs, places, strict=True)
        ]

    def show(self, row: Marked) -> str:
        shown = {"text": row.text, "head": row.text[slice(*row.first)]}
        shown |= {"tail": row.text[slice(*row.second)], "label": row.label}
        return json.dumps(shown, ensure_ascii=False)


def with_markers(
    row: Marked, ids: np.ndarray, offsets: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with a marker before and after each entity, and where both first markers stand.

    Args:
        row: with the entities' characters.
        ids, offsets: of its text's tokens.
        tokenizer: its vocabulary has the markers, or an unknown token stands for them.
    """
    known = [tokenizer.token_to_id(marker) for marker in MARKERS]
    markers = [tokenizer.unk_id if marker is None else marker for marker in known]
    inserts = []
    for marker, (start, end) in zip(markers, (row.first, row.second), strict=True):
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (0, -1)
        inserts.append((first, marker, last + 1))
    places = [place for first, _, last in inserts for place in (first, last)]
    values = [marker for _, marker, _ in inserts for _ in range(2)]
    # where an entity ends and the other begins, the end comes first
    rank = np.array([1, 0, 1, 0])
    order = np.lexsort((rank, np.array(places)))
    tokens = np.insert(ids, np.array(places)[order], np.array(values)[order])
    position = np.empty(4, dtype=np.int64)
    position[order] = np.array(places)[order] + np.arange(4)
    return tokens, position[[0, 2]]


def _window(starts: np.ndarray, length: int, size: int) -> tuple[int, int]:
    """A stretch of at most `size` tokens with both markers, as much on one side as on the other."""
    if length <= size:
        return 0, length
    low, high = int(starts.min()), int(starts.max()) + 1
    spare = size - (high - low)
    start = max(low if spare < 0 else low - spare // 2, 0)
    start = min(start, length - size)
    return start, start + size
