"""Question answering: where in a text the answer starts and ends, or that there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.kernels.ops import Rng
from fastbert.metrics.answers import answer_scores, best_null_threshold, overlap_f1
from fastbert.models import BertForQuestionAnswering, Targets
from fastbert.tasks.losses import Loss, Shaping, at_least_one, choice_loss
from fastbert.tasks.pairs import split_pair
from fastbert.tasks.saved import load_with_head
from fastbert.tasks.sequences import encode, join, room, say_share, windows
from fastbert.tasks.squad import Question, question, read_questions
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

# starts and ends that are combined with one another
BEST = 20


class Window(NamedTuple):
    """What a sequence shows of a context.

    Attributes:
        first: the context's first token in the sequence.
        offsets: [tokens, 2], characters of the context's tokens.
    """

    first: int
    offsets: np.ndarray


class Found(NamedTuple):
    """The best answer to a question.

    Attributes:
        start, end: characters of the context; both 0 where the context has no token.
        score: sum of the start's and the end's logit.
        margin: score of no answer, less `score`.
    """

    start: int
    end: int
    score: float
    margin: float


@dataclass
class Answer(Task):
    """An answer a question, as a span of its context; windows over long contexts."""

    name: ClassVar[str] = "answer"
    summary: ClassVar[str] = "answers to questions, as spans of a text"
    best_by: ClassVar[str] = "f1"
    noun: ClassVar[str] = "question"
    kept: ClassVar[tuple[str, ...]] = (
        "stride",
        "max_question_len",
        "max_answer_len",
        "may_be_unanswered",
        "null_threshold",
    )

    stride: int = option("tokens of context that neighbouring windows share", 128)
    max_question_len: int = option("tokens of a question; longer ones lose their end", 64)
    max_answer_len: int = option("tokens of an answer at most", 30)
    may_be_unanswered: bool = field(default=False, init=False)
    null_threshold: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        for name in ("max_question_len", "max_answer_len"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least 1, got {getattr(self, name)}")

    @property
    def shaped_by(self) -> tuple[str, ...]:
        return ("label_smoothing",)

    def read(self, path: str, say: Say) -> list[Question]:
        rows, remarks = read_questions(Path(path), self.encoding)
        if not rows:
            raise InputError(f"{path}: no question")
        empty = sum(not row.answers for row in rows)
        say(f"{path}: {counted(len(rows), 'question')}, {empty:,} without an answer; {remarks}")
        return rows

    def fit(self, rows: Sequence[Question], where: str = "training rows") -> None:
        self.check(rows, where)
        self.may_be_unanswered = any(not row.answers for row in rows)
        if not any(row.answers for row in rows):
            raise InputError(f"{where}: no question has an answer")

    def check(self, rows: Sequence[Question], where: str = "evaluation rows") -> None:
        bare = next((row for row in rows if not row.labelled), None)
        if bare is not None:
            place = f"{where}:{bare.line}" if bare.line else f"{where}: question {bare.id}"
            raise InputError(f"{place}: no field 'answers'")

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        return load_with_head(BertForQuestionAnswering, folder, self, dropout=dropout, seed=seed)

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        return BertForQuestionAnswering.from_pretrained(folder, config=config)

    def build(
        self,
        rows: Sequence[Question],
        tokenizer: Tokenizer,
        *,
        name: str = "",
        say: Say | None = None,
    ) -> Units:
        length = self.max_seq_len or 512
        questions = tokenizer.encode_batch([row.question for row in rows])
        # a context is asked about more than once
        different = {row.context: number for number, row in enumerate(rows)}
        encoded = dict(zip(different, encode(tokenizer, list(different)), strict=True))
        ids, types, owners, notes, places = [], [], [], [], []
        long = unreachable = 0
        for number, row in enumerate(rows):
            asked = questions[number][
                : min(self.max_question_len, room(tokenizer, True, length) // 2)
            ]
            context = encoded[row.context]
            size = room(tokenizer, True, length) - len(asked)
            stretches = windows(len(context.ids), size, min(self.stride, size // 2))
            long += len(stretches) > 1
            target = _tokens_of(row, context.offsets)
            unreachable += bool(row.answers) and target is None
            for start, end in stretches:
                joined = join(tokenizer, asked, context.ids[start:end])
                place = (0, 0)
                # elsewhere the first token says that the answer is not here
                if target is not None and start <= target[0] and target[1] < end:
                    shift = joined.second - start
                    place = (target[0] + shift, target[1] + shift)
                ids.append(joined.input_ids)
                types.append(joined.token_type_ids)
                owners.append(number)
                notes.append(Window(joined.second, context.offsets[start:end]))
                places.append(place)
        say_share(say, name, long, len(rows), "question", "windowed over their context")
        say_share(say, name, unreachable, len(rows), "answer", "that have no token")
        return Units(
            ids,
            types,
            rows=np.array(owners, dtype=np.int64),
            places=np.array(places, dtype=np.int64).reshape(-1, 2),
            notes=notes,
        )

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        found = model(batch, rng=rng)
        return Outputs(tokens=_stacked(found))

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.tokens is not None and batch.places is not None
        starts = batch.cu_seqlens.long()
        within = batch.places - starts[:-1, None]
        start, end = (
            choice_loss(outputs.tokens[:, side], starts, within[:, side], shaping)
            for side in (0, 1)
        )
        total = (start.total + end.total) / 2
        # how often the start is right, which stands for both
        return Loss(total / at_least_one(targets.labelled), start.correct)

    def tune(self, rows: Sequence[Question], units: Units, raw: Raw) -> None:
        if not self.may_be_unanswered:
            return
        found = self._best(rows, units, raw)
        scores = [
            overlap_f1(row.context[one.start : one.end], row.answers) if row.answers else 0.0
            for row, one in zip(rows, found, strict=True)
        ]
        self.null_threshold = best_null_threshold(
            np.array([one.margin for one in found]),
            np.array(scores),
            np.array([bool(row.answers) for row in rows]),
        )

    def _best(self, rows: Sequence[Question], units: Units, raw: Raw) -> list[Found]:
        assert units.rows is not None
        found = [Found(0, 0, -np.inf, 0.0)] * len(rows)
        null = np.full(len(rows), np.inf)
        logits = raw.tokens or []
        for number, note, scores in zip(units.rows.tolist(), units.notes, logits, strict=True):
            null[number] = min(null[number], float(scores[0].sum()))
            best = best_span(scores, note, self.max_answer_len)
            if best is not None and best.score > found[number].score:
                found[number] = best
        return [
            one._replace(margin=float(nothing - one.score))
            for one, nothing in zip(found, null, strict=True)
        ]

    def answers(self, rows: Sequence[Question], units: Units, raw: Raw) -> list[dict[str, Any]]:
        out = []
        for row, one in zip(rows, self._best(rows, units, raw), strict=True):
            silent = not np.isfinite(one.score) or (
                self.may_be_unanswered and one.margin > self.null_threshold
            )
            text = "" if silent else row.context[one.start : one.end]
            answer: dict[str, Any] = {"id": row.id, "question": row.question, "answer": text}
            if not silent:
                answer |= {"start": one.start, "end": one.end, "score": round(one.score, 4)}
            # a context without a token has no answer to compare with
            if self.may_be_unanswered and np.isfinite(one.margin):
                answer["no_answer_margin"] = round(one.margin, 4)
            if row.labelled:
                answer["true_answers"] = list(row.answers)
            out.append(answer)
        return out

    def plain(self, answer: dict[str, Any], line: str) -> str | None:
        return str(answer["answer"])

    def is_right(self, row: Question, answer: dict[str, Any]) -> bool | None:
        return overlap_f1(answer["answer"], row.answers) == 1.0

    def score(self, rows: Sequence[Question], units: Units, raw: Raw) -> Scores:
        said = [answer["answer"] for answer in self.answers(rows, units, raw)]
        figures = answer_scores(said, [row.answers for row in rows])
        if self.may_be_unanswered:
            figures["null_threshold"] = self.null_threshold
        return Scores(figures)

    def from_line(self, text: str, where: str) -> Any:
        return split_pair(text, where, "question and context are wanted")

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Question]:
        rows = []
        for given, place in zip(inputs, places, strict=True):
            if isinstance(given, list | tuple) and len(given) == 2:
                given = {"question": str(given[0]), "context": str(given[1])}
            # its number is its id where it has no other
            rows.append(question(place, given, place.rpartition(":")[2]))
        return rows

    def show(self, row: Question) -> str:
        shown = {"question": row.question, "answers": list(dict.fromkeys(row.answers))}
        return json.dumps({**shown, "context": row.context}, ensure_ascii=False)


def best_span(scores: np.ndarray, window: Window, longest: int) -> Found | None:
    """The best start and end within a window's context, no longer than `longest` tokens.

    Args:
        scores: [tokens of the sequence, 2] logits.
        window: where the context is.
        longest: tokens of an answer at most.

    Returns:
        None where the window shows no token of the context.
    """
    count = len(window.offsets)
    if not count:
        return None
    inside = scores[window.first : window.first + count].astype(np.float64)
    starts, ends = (np.argsort(-inside[:, side], kind="stable")[:BEST] for side in (0, 1))
    sums = inside[starts, 0][:, None] + inside[ends, 1][None, :]
    lengths = ends[None, :] - starts[:, None] + 1
    sums[(lengths < 1) | (lengths > longest)] = -np.inf
    if not np.isfinite(sums).any():
        # no pair of the best is in order: the best start alone
        start = end = int(starts[0])
    else:
        one, two = np.unravel_index(int(sums.argmax()), sums.shape)
        start, end = int(starts[one]), int(ends[two])
    score = float(inside[start, 0] + inside[end, 1])
    return Found(int(window.offsets[start, 0]), int(window.offsets[end, 1]), score, 0.0)


def _tokens_of(row: Question, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last token of the first answer; None where there is none."""
    if not row.answers:
        return None
    start, end = row.starts[0], row.starts[0] + len(row.answers[0])
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _stacked(found: Any) -> Tensor:

    return torch.stack([found.start_logits, found.end_logits], dim=-1)
