"""What a task is: a reader, units, a model's outputs, a loss, answers and scores.

The trainer, `evaluate`, `predict` and `pipeline` know nothing else of a task:

1. `read` rows from a file; `fit` looks at the training rows, `check` at others.
2. `load` a model with the task's head; `build` units of rows.
3. `forward` gives outputs of a batch, `loss` what is wrong with them.
4. `answers` and `score` read outputs of all units.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.classification import ClassScore
from fastbert.models import Targets
from fastbert.tasks.losses import Loss, Shaping
from fastbert.tasks.records import FileFormat
from fastbert.tasks.sequences import say_share
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

Say = Callable[[str], None]
# fields of rows that say what is asked, whatever the task
_ASKED = ("text", "first", "second", "words", "question", "context", "choices", "texts")


def option(help: str, default: Any = None) -> Any:
    """A field that is a flag of the task's command."""
    return field(default=default, metadata={"help": help})


@dataclass
class Outputs:
    """What a model says of a batch.

    Attributes:
        sequences: [sequences, numbers], or [units, numbers] where a unit's are pooled.
        tokens: [tokens, numbers].
        pooled: which of the two `sequences` are.
        shared: what the loss needs besides, the same for all batches.
    """

    sequences: Tensor | None = None
    tokens: Tensor | None = None
    pooled: bool = False
    shared: Any = None


@dataclass
class Raw:
    """Outputs of all units, on the host.

    Attributes:
        sequences: [sequences, numbers] float32, or [units, numbers].
        tokens: [tokens, numbers] float32 of each sequence.
        shared: numbers of the model itself that reading answers needs.
    """

    sequences: np.ndarray | None = None
    tokens: list[np.ndarray] | None = None
    shared: np.ndarray | None = None


@dataclass
class Scores:
    """An evaluation.

    Attributes:
        figures: by name.
        table: a row a class, where there are classes.
        confusion: counts [true, predicted], with the names of the classes.
    """

    figures: dict[str, float]
    table: list[ClassScore] = field(default_factory=list)
    confusion: tuple[np.ndarray, list[str]] | None = None


@dataclass
class Task(ABC):
    """One task with its options; after `fit` or `restore` also with what it learnt from the rows.

    Attributes:
        name: of the command, and in task.json.
        summary: in the command's help.
        best_by: the figure that chooses among evaluations; more is better.
        kept: names of attributes that task.json keeps.
        noun: what a row is called.
        parts: what units are called where they are not rows.
        labels: class names, in the order of the model's outputs.
        max_seq_len: tokens a sequence; None for the model's positions.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    best_by: ClassVar[str]
    kept: ClassVar[tuple[str, ...]] = ()
    noun: ClassVar[str] = "text"
    parts: ClassVar[str] = "windows"

    encoding: str = option("of the files", "utf-8")
    labels: list[str] = field(default_factory=list, init=False)
    max_seq_len: int | None = field(default=None, init=False)

    @property
    def shaped_by(self) -> tuple[str, ...]:
        """Of "class_weights" and "label_smoothing" those that its loss takes."""
        return ("class_weights", "label_smoothing")

    @property
    def has_head(self) -> bool:
        """Whether there is something to train beside the encoder."""
        return True

    @property
    def form(self) -> FileFormat:
        """How the files are written."""
        return FileFormat(self.encoding)

    @abstractmethod
    def read(self, path: str, say: Say) -> list[Any]:
        """Rows of a file; the first file that is read decides how others are.

        Raises:
            InputError: naming file and line.
        """

    @abstractmethod
    def fit(self, rows: Sequence[Any], where: str) -> None:
        """Learn from the training rows, e.g. the set of labels.

        Raises:
            InputError: rows that cannot be learnt from.
        """

    @abstractmethod
    def check(self, rows: Sequence[Any], where: str) -> None:
        """Look at the evaluation rows before any work is done.

        Raises:
            InputError: rows that the training rows do not cover.
        """

    def examples(self, rows: Sequence[Any], where: str, say: Say) -> Sequence[Any]:
        """What `build` makes units to train on of: the rows, or several put together."""
        return rows

    def units_a_step(self, batch_size: int) -> int:
        """Units to train on that an optimiser step of --batch-size takes."""
        return batch_size

    @abstractmethod
    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        """A saved model with this task's head, and which parts of it are fresh."""

    @abstractmethod
    def restore_model(self, folder: Path) -> nn.Module:
        """The model that `save_model` wrote."""

    def save_model(self, model: Any, folder: Path) -> None:
        """Write the model in Hugging Face's layout."""
        model.save_pretrained(folder)

    @abstractmethod
    def build(
        self, rows: Sequence[Any], tokenizer: Tokenizer, *, name: str = "", say: Say | None = None
    ) -> Units:
        """Units of rows, with targets where the rows have some."""

    @abstractmethod
    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        """Run the model; targets are not looked at."""

    def shared(self, model: Any) -> np.ndarray | None:
        """Numbers of the model itself that reading answers needs."""
        return None

    def targets_shown(self, targets: Targets) -> int | Tensor:
        """What the progress bar divides the number of right answers by."""
        return targets.labelled

    @abstractmethod
    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        """The batch's share of the step's loss, and how many units are right.

        Args:
            outputs: of `forward`.
            batch: with targets.
            targets: of the whole optimiser step, by which sums are divided.
            shaping: class weights and smoothing.
        """

    @abstractmethod
    def answers(self, rows: Sequence[Any], units: Units, raw: Raw) -> list[dict[str, Any]]:
        """What the model says of each row, as `predict` writes it."""

    @abstractmethod
    def score(self, rows: Sequence[Any], units: Units, raw: Raw) -> Scores:
        """Scores of rows whose right answers are known."""

    @abstractmethod
    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Any]:
        """Rows of what a caller asks about: texts, or dictionaries as in a line of jsonl.

        Args:
            inputs: in their order.
            places: where each is from, such as "file:line", for an error message.

        Raises:
            InputError: naming the input's place.
        """

    def from_line(self, text: str, where: str) -> Any:
        """What a line of plain text asks, as `rows_of` takes it.

        Raises:
            InputError: a line that the task cannot read.
        """
        return text

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        """An answer in one line of text; None where it needs a JSON object."""
        return None

    def rank(self, figures: dict[str, float]) -> tuple[float, float]:
        """What makes one evaluation better than another: more, then a lower loss."""
        return figures[self.best_by], -figures.get("loss", 0.0)

    def summarise(self, figures: dict[str, float]) -> str:
        """An evaluation in a few words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())

    def show(self, row: Any) -> str:
        """A row as it was read, for the first one of a file."""
        return repr(row)

    def tune(self, rows: Sequence[Any], units: Units, raw: Raw) -> None:
        """Choose what is to be chosen on evaluation rows, in training alone: a threshold."""
        return None

    def is_right(self, row: Any, answer: dict[str, Any]) -> bool | None:
        """Whether an answer is right; None where that is no question of yes or no."""
        return None

    def class_counts(self, units: Units) -> np.ndarray | None:
        """[classes] targets of each class, where class weights have a meaning."""
        return None

    def facts(self) -> dict[str, Any]:
        """What task.json holds."""
        names = ("max_seq_len", *self.kept)
        return {"task": self.name, **{name: getattr(self, name) for name in names}}

    def restore(self, facts: dict[str, Any], config: EncoderConfig, where: str) -> None:
        """Take over what task.json and config.json say.

        Raises:
            InputError: a fact of another type than it must have.
        """
        self.labels = list(config.labels)
        defaults = {f.name: f for f in dataclasses.fields(self)}
        for name in ("max_seq_len", *self.kept):
            if name not in facts:
                continue
            value, like = facts[name], getattr(self, name)
            # what may be left out is text everywhere
            wanted = str if like is None and value is not None else type(like)
            if name != "max_seq_len" and type(value) is not wanted:
                kind = _KINDS.get(wanted, wanted.__name__)
                raise InputError(f"{where}: {name} must be {kind}, got {value!r}")
            assert name in defaults
            setattr(self, name, value)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def first_row(task: Task, path: str, rows: Sequence[Any], say: Say) -> None:
    """Show the first row of a file as it was understood."""
    say(f"{path}: first {task.noun}: {shortened(task.show(rows[0]))}")


def say_overlap(
    task: Task, path: str, training: Sequence[Any], evaluation: Sequence[Any], say: Say
) -> None:
    """Tell how many evaluation rows ask what a training row asks: their scores say little."""
    if getattr(evaluation, "kind", "") == "collection":
        # documents are to be found among, not to be answered
        return
    seen = {_asked(row) for row in training}
    both = sum(_asked(row) in seen for row in evaluation)
    say_share(say, path, both, len(evaluation), task.noun, "also in the training file")


def _asked(row: Any) -> tuple[Any, ...]:
    return tuple(getattr(row, name, None) for name in _ASKED)


def shortened(text: str, most: int = 200) -> str:
    """At most so many characters, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
