"""Classification of texts and pairs of texts: label sets, packed examples, answers, scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastbert.data.epochs import snug_capacity
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.metrics.classification import accuracy, macro_f1, majority
from fastbert.models import BertForSequenceClassification
from fastbert.packing import Examples, best_fit
from fastbert.tasks.table import Row
from fastbert.tokenizer import Tokenizer

# tokens a batch where no gradient is wanted
TOKEN_BUDGET = 4096
# more labels than this, and hardly one twice: the column is no class
MOST_RARE_LABELS = 20


class Predictions(NamedTuple):
    """Answers in the order of the texts.

    Attributes:
        labels: the likeliest class of each text.
        probabilities: [texts, classes] float32, in the order of `config.labels`.
    """

    labels: list[str]
    probabilities: np.ndarray


def label_set(rows: Sequence[Row], where: str = "training rows") -> list[str]:
    """The classes of a training set; numbers in the order of their values, else sorted.

    Raises:
        InputError: fewer than two classes, or nearly as many as rows.
    """
    labels = Counter(row.label for row in rows)
    if len(labels) < 2:
        raise InputError(
            f"{where}: at least 2 different labels are needed, found {len(labels)} "
            f"({', '.join(labels)})"
        )
    if len(labels) > max(MOST_RARE_LABELS, len(rows) / 2):
        raise InputError(
            f"{where}: {len(labels):,} different labels in {len(rows):,} rows are no classes; "
            "--label-column names another column"
        )
    numbers = [_number(label) for label in labels]
    if None in numbers:
        return sorted(labels)
    return [label for _, label in sorted(zip(numbers, labels, strict=True))]


def _number(label: str) -> float | None:
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_labels(
    rows: Sequence[Row], labels: Sequence[str], where: str = "evaluation rows"
) -> None:
    """Refuse a class that is not in the label set.

    Raises:
        InputError: naming the class and its line.
    """
    known = set(labels)
    for row in rows:
        if row.label not in known:
            line = f":{row.line}" if row.line else ""
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise InputError(
                f"{where}{line}: the class {row.label!r} is not among those of the training file "
                f"({shown})"
            )


def build_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    labels: Sequence[str] | None,
    max_seq_len: int,
    *,
    name: str = "",
    say: Callable[[str], None] | None = None,
) -> Examples:
    """[CLS] text [SEP], or [CLS] text [SEP] second [SEP] (Devlin et al. 2018, figure 4).

    Args:
        rows: texts; pairs where `second` is not None.
        tokenizer: the model's.
        labels: the label set, of which every row's label is one; None for texts without labels.
        max_seq_len: tokens a sequence; longer texts lose their end, of a pair the longer one
            token by token.
        name: of the rows, for what is said.
        say: told how many texts were cut, if any.
    """
    first = tokenizer.encode_batch([row.text for row in rows])
    paired = [number for number, row in enumerate(rows) if row.second is not None]
    encoded = tokenizer.encode_batch([rows[number].second or "" for number in paired])
    second = dict(zip(paired, encoded, strict=True))
    input_ids, token_type_ids, cut = [], [], 0
    cls, sep = np.array([tokenizer.cls_id]), np.array([tokenizer.sep_id])
    for number, one in enumerate(first):
        two = second.get(number)
        room = max_seq_len - (2 if two is None else 3)
        of_one, of_two = cut_lengths(len(one), 0 if two is None else len(two), room)
        parts = [cls, one[:of_one], sep]
        cut += of_one < len(one)
        if two is not None:
            parts += [two[:of_two], sep]
            cut += of_one == len(one) and of_two < len(two)
        types = np.zeros(sum(map(len, parts)), dtype=np.int64)
        types[of_one + 2 :] = 1
        input_ids.append(np.concatenate(parts))
        token_type_ids.append(types)
    if cut and say:
        of = f"{cut:,} of {counted(len(rows), 'text')}"
        say(f"{name or 'texts'}: {of} cut to {max_seq_len} tokens")
    nothing = np.zeros(0, dtype=np.int64)
    return Examples(
        input_ids=np.concatenate([nothing, *input_ids]),
        token_type_ids=np.concatenate([nothing, *token_type_ids]),
        cu_seqlens=np.cumsum([0, *map(len, input_ids)], dtype=np.int64),
        sequence_labels=None if labels is None else _targets(rows, labels),
    )


def _targets(rows: Sequence[Row], labels: Sequence[str]) -> np.ndarray:
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[row.label] for row in rows], dtype=np.int64)


def cut_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of each text stays when the longer one loses its last token until both fit.

    At equal lengths the second one loses, as in google-research/bert.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if shorter <= room // 2:
        return (room - second, second) if first > second else (first, room - first)
    return room - room // 2, room // 2


def logits(
    model: BertForSequenceClassification,
    examples: Examples,
    *,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
) -> np.ndarray:
    """[sequences, classes] float32, in the order of the examples.

    Args:
        model: with a classification head.
        examples: labels are not looked at.
        dtype: of matrix products.
        token_budget: tokens a batch, more where one sequence needs more.
    """
    device = model.word_weight.device
    lengths = examples.lengths
    out = np.zeros((len(examples), len(model.config.labels)), dtype=np.float32)
    unlabelled = Examples(examples.input_ids, examples.token_type_ids, examples.cu_seqlens)
    budget = max(token_budget, int(lengths.max(initial=0)))
    mixed = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), mixed:
        for chosen in best_fit(lengths, budget):
            batch = unlabelled.batch(chosen, snug_capacity(lengths[chosen]))
            result = model(batch.to(device)).logits
            assert result is not None
            out[chosen] = result.float().cpu().numpy()
    return out


def classify(
    model: BertForSequenceClassification,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    seconds: Sequence[str] | None = None,
    *,
    max_seq_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
    say: Callable[[str], None] | None = None,
) -> Predictions:
    """The class of each text, packed: no padding is computed.

    Args:
        model: with a classification head.
        tokenizer: the model's.
        texts: in any order; answers come in theirs.
        seconds: the second text of each pair; None for single texts.
        max_seq_len: tokens a sequence; None for the model's positions.
        dtype: of matrix products.
        token_budget: tokens a batch.
        say: told how many texts were cut, if any.

    Raises:
        ValueError: not as many second texts as texts.
        InputError: weights that are not finite.
    """
    if seconds is not None and len(seconds) != len(texts):
        raise ValueError(f"classify: {len(texts)} texts but {len(seconds)} second texts")
    others: Sequence[str | None] = [None] * len(texts) if seconds is None else seconds
    rows = [Row(text, second=other) for text, other in zip(texts, others, strict=True)]
    limit = max_seq_len or model.config.max_seqlen
    examples = build_examples(rows, tokenizer, None, limit, say=say)
    probabilities = softmax(logits(model, examples, dtype=dtype, token_budget=token_budget))
    if not np.isfinite(probabilities).all():
        raise InputError("classify: the model's weights are not finite")
    best = probabilities.argmax(axis=-1)
    return Predictions([model.config.labels[index] for index in best], probabilities)


def score(
    model: BertForSequenceClassification,
    examples: Examples,
    *,
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
) -> dict[str, float]:
    """Accuracy, macro_f1, majority (baseline) and loss (nats a text) on labelled examples."""
    assert examples.sequence_labels is not None
    labels = examples.sequence_labels
    found = logits(model, examples, dtype=dtype, token_budget=token_budget)
    predicted = found.argmax(axis=-1)
    right = np.take_along_axis(_log_softmax(found), labels[:, None], axis=-1)
    return {
        "accuracy": accuracy(predicted, labels),
        "macro_f1": macro_f1(predicted, labels),
        "majority": majority(labels),
        "loss": float(-right.mean()),
    }


def softmax(values: np.ndarray) -> np.ndarray:
    """[rows, classes] probabilities in the dtype of the logits."""
    return np.exp(_log_softmax(values)).astype(values.dtype)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
