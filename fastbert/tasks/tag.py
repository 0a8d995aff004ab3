"""Tagging of words: entities, parts of speech, or any other tag a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import accuracy, per_class
from fastbert.metrics.entities import OUTSIDE, entities, entity_scores, guess_scheme
from fastbert.models import BertForTokenClassification, Targets
from fastbert.packing import IGNORE_INDEX
from fastbert.task_heads import TransitionScores, WithHead, load_head
from fastbert.tasks.conll import Sentence, read_tagged, split_words, tags_of
from fastbert.tasks.labels import check_labels, indices
from fastbert.tasks.losses import Loss, Shaping, at_least_one
from fastbert.tasks.saved import load_with_head
from fastbert.tasks.tagging import (
    allowed_transitions,
    entities_of,
    entity_answers,
    path_loss,
    predicted_tags,
    tag_loss,
    word_units,
)
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer


@dataclass
class Tag(Task):
    """One tag a word; entities where the tags have prefixes."""

    name: ClassVar[str] = "tag"
    summary: ClassVar[str] = "a tag a word: entities, parts of speech"
    best_by: ClassVar[str] = "f1"
    kept: ClassVar[tuple[str, ...]] = ("scheme", "crf", "stride")
    noun: ClassVar[str] = "sentence"

    crf: bool = option("score tags side by side too (a conditional random field)", False)
    stride: int = option("tokens that neighbouring windows of a long sentence share", 64)
    scheme: str | None = field(default=None, init=False)
    fitted: bool = field(default=False, init=False)

    @property
    def shaped_by(self) -> tuple[str, ...]:
        # whole sequences of tags are scored there
        return () if self.crf else super().shaped_by

    def read(self, path: str, say: Say) -> list[Sentence]:
        found = read_tagged(Path(path), self.encoding)
        sentences = found.sentences
        own = _scheme(path, sentences)
        guess = f"tags in {own}" if own else "tags without prefixes"
        if own == "IOB1":
            # one scheme for a mark and what it begins: IOB2
            sentences = [
                s._replace(tags=tags_of(entities(s.tags or (), own), len(s.words)))
                for s in sentences
            ]
            own, guess = "IOB2", f"{guess}, read as IOB2"
        if not self.fitted:
            self.scheme, self.fitted = own, True
        words = sum(len(sentence.words) for sentence in sentences)
        say(
            f"{path}: {counted(len(sentences), 'sentence')}, {counted(words, 'word')}; "
            f"{found.remarks}; {guess} (guessed)"
        )
        return sentences

    def fit(self, rows: Sequence[Sentence], where: str = "training rows") -> None:
        tags = {tag for row in rows for tag in row.tags or ()}
        if len(tags) < 2:
            raise InputError(f"{where}: at least 2 different tags are needed, found {len(tags)}")
        self.labels = sorted(tags - {OUTSIDE})
        if OUTSIDE in tags:
            self.labels.insert(0, OUTSIDE)

    def check(self, rows: Sequence[Sentence], where: str = "evaluation rows") -> None:
        check_labels(
            ((row.line, tag) for row in rows for tag in row.tags or ()), self.labels, where
        )

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        body, fresh = load_with_head(
            BertForTokenClassification, folder, self, dropout=dropout, seed=seed
        )
        if not self.crf:
            return body, fresh
        allowed = allowed_transitions(self.labels, self.scheme)
        return WithHead(body, TransitionScores(len(self.labels), allowed)), [*fresh, "transitions"]

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        config.labels = list(self.labels)
        body = BertForTokenClassification.from_pretrained(folder, config=config)
        if not self.crf:
            return body
        return WithHead(body, load_head(TransitionScores(len(self.labels)), folder))

    def restore(self, facts: dict[str, Any], config: EncoderConfig, where: str) -> None:
        super().restore(facts, config, where)
        self.fitted = True
        if "scheme" not in facts:
            self.scheme = guess_scheme([self.labels])

    def build(
        self,
        rows: Sequence[Sentence],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        return word_units(rows, self.labels, tokenizer, length, self.stride, name=name, say=say)

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        if not self.crf:
            return Outputs(tokens=model(batch, rng=rng).logits)
        return Outputs(tokens=model.body(batch, rng=rng).logits, shared=model.head)

    def shared(self, model: Any) -> np.ndarray | None:
        return model.head.transitions.detach().float().cpu().numpy() if self.crf else None

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.tokens is not None
        if self.crf:
            found = path_loss(outputs.tokens, batch, outputs.shared)
        else:
            found = tag_loss(outputs.tokens, batch, shaping)
        return Loss(found.total / at_least_one(targets.masked), found.correct)

    def targets_shown(self, targets: Targets) -> int | Tensor:
        return targets.masked

    def answers(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> list[dict[str, Any]]:
        tagged = self._tags(rows, units, raw)
        return [
            {
                **words_of(row),
                "tags": tags,
                "entities": entity_answers(row, tags, self.scheme) if self.is_entities else [],
                **({} if row.tags is None else {"true_tags": list(row.tags)}),
            }
            for row, tags in zip(rows, tagged, strict=True)
        ]

    def _tags(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> list[list[str]]:
        return predicted_tags(rows, units, raw.tokens or [], self.labels, raw.shared)

    @property
    def is_entities(self) -> bool:
        """Whether tags mark entities, rather than one thing a word."""
        return self.scheme is not None

    def is_right(self, row: Sentence, answer: dict[str, Any]) -> bool | None:
        return list(row.tags or ()) == answer["tags"]

    def rank(self, figures: dict[str, float]) -> tuple[float, float]:
        return figures["f1" if self.is_entities else "accuracy"], figures["accuracy"]

    def score(self, rows: Sequence[Sentence], units: Units, raw: Raw) -> Scores:
        tagged = self._tags(rows, units, raw)
        said = indices((tag for tags in tagged for tag in tags), self.all_tags)
        true = indices((tag for row in rows for tag in row.tags or ()), self.all_tags)
        if not self.is_entities:
            return Scores({"accuracy": accuracy(said, true)}, per_class(said, true, self.all_tags))
        figures, table = entity_scores(
            [entities(tags, self.scheme) for tags in tagged], entities_of(rows, self.scheme)
        )
        return Scores({**figures, "accuracy": accuracy(said, true)}, table)

    @property
    def all_tags(self) -> list[str]:
        """The tag set, and O for words without a token."""
        return self.labels if OUTSIDE in self.labels else [*self.labels, OUTSIDE]

    def class_counts(self, units: Units) -> np.ndarray | None:
        labels = np.concatenate(list(units.token_labels or []))
        return np.bincount(labels[labels != IGNORE_INDEX], minlength=len(self.labels))

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Sentence]:
        return [sentence_of(*asked) for asked in zip(inputs, places, strict=True)]

    def show(self, row: Sentence) -> str:
        pairs = [f"{word}/{tag}" for word, tag in zip(row.words, row.tags or (), strict=True)]
        return " ".join(pairs)


def words_of(row: Sentence) -> dict[str, Any]:
    """What tags are of, for an answer: words, and the text that they were cut from."""
    text = {} if row.text is None else {"text": row.text}
    return {**text, "words": list(row.words)}


def sentence_of(given: Any, where: str) -> Sentence:
    """A sentence of text, or of words.

    Raises:
        InputError: neither.
    """
    if isinstance(given, dict):
        given = next(
            (given[n] for n in ("tokens", "words", "text", "sentence") if n in given), None
        )
    if isinstance(given, str):
        words, offsets = split_words(given)
        return Sentence(words, text=given, offsets=offsets)
    if isinstance(given, list | tuple) and all(isinstance(word, str) for word in given):
        return Sentence(tuple(given))
    raise InputError(
        f"{where}: a text or a list of words is wanted, as such or as a field text or tokens, "
        f"got {json.dumps(given, ensure_ascii=False, default=repr)[:60]}"
    )


def _scheme(path: str, sentences: Sequence[Sentence]) -> str | None:
    try:
        return guess_scheme(sentence.tags or () for sentence in sentences)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
