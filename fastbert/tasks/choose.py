"""Multiple choice: which of a question's choices is right."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import accuracy
from fastbert.models import BertForMultipleChoice, Targets
from fastbert.tasks.inference import softmax
from fastbert.tasks.losses import Loss, Shaping, at_least_one, choice_loss
from fastbert.tasks.records import read_records, text_field
from fastbert.tasks.saved import load_with_head
from fastbert.tasks.sequences import join_cut, say_share
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

_QUESTIONS = ("question", "prompt", "sent2", "ctx", "sent1", "premise", "text")
_CONTEXTS = ("context", "passage", "article", "premise", "sent1")
_LABELS = ("label", "answer", "correct", "target")
# one column a choice, as SWAG and COPA have them
_COLUMN = re.compile(r"(?:ending|choice|option|answer|alternative)_?([0-9]|[a-h])", re.IGNORECASE)
ACCEPTED = (
    "question (after context, where there is one), choices (a list, or columns ending0, ending1 "
    "...) and label, which names the right one by its number, from 0, by letter or by its text"
)


class Choices(NamedTuple):
    """One example.

    Attributes:
        question: what stands before each choice.
        choices: two or more.
        label: number of the right one; None where it is asked for.
        line: in its file.
    """

    question: str
    choices: tuple[str, ...]
    label: int | None = None
    line: int = 0


@dataclass
class Choose(Task):
    """The right one of a question's choices, of which there may be any number."""

    name: ClassVar[str] = "choose"
    summary: ClassVar[str] = "the right one of several choices"
    best_by: ClassVar[str] = "accuracy"
    noun: ClassVar[str] = "question"
    kept: ClassVar[tuple[str, ...]] = ("first_label",)

    first_label: int = option("what label numbers count from", 0)

    @property
    def shaped_by(self) -> tuple[str, ...]:
        return ("label_smoothing",)

    def read(self, path: str, say: Say) -> list[Choices]:
        records = read_records(Path(path), self.form)
        rows = [
            choices_of(r.fields, f"{path}:{r.line}", self.first_label, r.line) for r in records.rows
        ]
        blank = [row for row in rows if row.label is None]
        if blank:
            raise InputError(f"{path}:{blank[0].line}: no label; {ACCEPTED} are read")
        sizes = sorted({len(row.choices) for row in rows})
        shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        say(f"{path}: {counted(len(rows), 'question')} with {shown} choices{records.remarks()}")
        return rows

    def fit(self, rows: Sequence[Choices], where: str = "training rows") -> None:
        """There is nothing to learn from the rows: choices have no names."""

    def check(self, rows: Sequence[Choices], where: str = "evaluation rows") -> None:
        """Every row was looked at when it was read."""

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        return load_with_head(BertForMultipleChoice, folder, self, dropout=dropout, seed=seed)

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        return BertForMultipleChoice.from_pretrained(folder, config=config)

    def build(
        self,
        rows: Sequence[Choices],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        questions = tokenizer.encode_batch([row.question for row in rows])
        texts = [choice for row in rows for choice in row.choices]
        owners = np.repeat(np.arange(len(rows)), [len(row.choices) for row in rows])
        joined = [
            join_cut(tokenizer, questions[owner], ids, length)
            for owner, ids in zip(owners, tokenizer.encode_batch(texts), strict=True)
        ]
        cut = sum(was_cut for _, was_cut in joined)
        say_share(say, name, cut, len(texts), "choice", f"cut to {length} tokens with its question")
        return Units(
            [one.input_ids for one, _ in joined],
            [one.token_type_ids for one, _ in joined],
            cu_units=np.cumsum([0, *(len(row.choices) for row in rows)]),
            unit_labels=np.array([row.label or 0 for row in rows], dtype=np.int64),
        )

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        return Outputs(sequences=model(batch, rng=rng).logits.view(-1, 1))

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and batch.unit_labels is not None
        assert batch.cu_units is not None
        found = choice_loss(
            outputs.sequences.squeeze(-1), batch.cu_units, batch.unit_labels, shaping
        )
        return Loss(found.total / at_least_one(targets.labelled), found.correct)

    def answers(self, rows: Sequence[Choices], units: Units, raw: Raw) -> list[dict[str, Any]]:
        out = []
        for row, scores in zip(rows, _by_unit(units, raw), strict=True):
            shares = softmax(scores)
            best = int(shares.argmax())
            out.append(
                {
                    "question": row.question,
                    "choices": list(row.choices),
                    "choice": best,
                    "text": row.choices[best],
                    "probabilities": [round(float(share), 6) for share in shares],
                    **({} if row.label is None else {"true_choice": row.label}),
                }
            )
        return out

    def is_right(self, row: Choices, answer: dict[str, Any]) -> bool | None:
        return bool(row.label == answer["choice"])

    def score(self, rows: Sequence[Choices], units: Units, raw: Raw) -> Scores:
        assert units.unit_labels is not None
        said = np.array([int(scores.argmax()) for scores in _by_unit(units, raw)])
        chance = float(np.mean([1 / len(row.choices) for row in rows]))
        return Scores({"accuracy": accuracy(said, units.unit_labels), "chance": chance})

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Choices]:
        return [
            choices_of(given, place, self.first_label)
            for given, place in zip(inputs, places, strict=True)
        ]

    def from_line(self, text: str, where: str) -> Any:
        raise InputError(f"{where}: choices are asked in .jsonl: {ACCEPTED}")

    def show(self, row: Choices) -> str:
        return json.dumps(row._asdict() | {"line": row.line}, ensure_ascii=False)


def _by_unit(units: Units, raw: Raw) -> list[np.ndarray]:
    assert raw.sequences is not None and units.cu_units is not None
    return np.split(raw.sequences[:, 0], units.cu_units[1:-1])


def choices_of(fields: Any, where: str, first_label: int = 0, line: int = 0) -> Choices:
    """A question with its choices.

    Raises:
        InputError: fewer than two choices, or a label that names none.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{where}: a dictionary is wanted: {ACCEPTED}")
    named = next((name for name in _QUESTIONS if name in fields), None)
    if named is None:
        raise InputError(f"{where}: no question; {ACCEPTED} are read")
    asked = text_field(where, fields, named)
    before = next((name for name in _CONTEXTS if fields.get(name) and name != named), None)
    if before is not None:
        asked = f"{text_field(where, fields, before)} {asked}"
    given = fields.get("choices", fields.get("options"))
    if given is None:
        columns = sorted(name for name in fields if _COLUMN.fullmatch(name))
        given = [fields[name] for name in columns]
    if isinstance(given, dict):
        given = given.get("text")
    if (
        not isinstance(given, list)
        or len(given) < 2
        or not all(isinstance(choice, str) for choice in given)
    ):
        raise InputError(f"{where}: at least 2 choices are needed; {ACCEPTED} are read")
    named = next((name for name in _LABELS if fields.get(name) not in (None, "")), None)
    label = None if named is None else _label(where, fields[named], given, first_label)
    return Choices(asked, tuple(given), label, line)


def _label(where: str, value: Any, choices: Sequence[str], first: int) -> int:
    text = str(value).strip()
    if not isinstance(value, bool) and re.fullmatch(r"-?\d+", text):
        number = int(text) - first
    elif len(text) == 1 and text.isalpha() and text not in choices:
        number = ord(text.lower()) - ord("a")
    else:
        number = choices.index(text) if text in choices else -1
    if not 0 <= number < len(choices):
        raise InputError(
            f"{where}: the label {value!r} names none of the {len(choices)} choices; {ACCEPTED}"
        )
    return number
