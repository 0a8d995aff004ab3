"""Which column of a table holds the text, the second text and the label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastbert.errors import InputError

# first match wins; names are compared in lower case
_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("#1 string", "#2 string"),
)
_TEXTS = (
    "sentence",
    "text",
    "text_a",
    "content",
    "review",
    "document",
    "comment",
    "question",
    "query",
    "utterance",
    "tweet",
    "message",
    "body",
    "abstract",
)
LABELS = (
    "label",
    "labels",
    "gold_label",
    "class",
    "category",
    "target",
    "sentiment",
    "polarity",
    "intent",
    "topic",
    "tag",
    "is_duplicate",
    "quality",
    "y",
)
# what a column of scores of pairs is usually called
SCORES = ("score", "similarity", "similarity_score", "relatedness_score", "rating", "label", "gold")
# never a label, whatever else is left
_NUMBERS = ("index", "idx", "id", "guid", "uid", "row", "number", "unnamed: 0")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    Attributes:
        text: the text, or the first of a pair.
        label: the class.
        pair: the second text, None where there is one text a row.
    """

    text: str
    label: str
    pair: str | None = None

    @property
    def wanted(self) -> list[str]:
        """All of them, text first."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


def guess_columns(
    names: Sequence[str],
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    where: str = "table",
    label_names: Sequence[str] = LABELS,
) -> Columns:
    """Choose among column names by what they are usually called.

    Args:
        names: of all columns.
        text, pair, label: chosen already; None for a guess. A second text is guessed only with
            the first; "" for none.
        where: in front of an error message.
        label_names: what a label column is usually called.

    Raises:
        InputError: no name tells.
    """
    known = {name.strip().lower(): name for name in reversed(names) if name.strip()}
    taken = {text, pair, label}
    if label is None:
        label = _first(known, label_names, taken)
    if text is None:
        text, pair = _guess_texts(known, pair, label)
    # with one of the two known, the only column that is left is the other
    left = [
        name
        for low, name in known.items()
        if name not in (text, pair, label) and (low not in _NUMBERS)
    ]
    if text is None and label is not None and len(left) == 1:
        text = left[0]
    elif label is None and text is not None and len(left) == 1:
        label = left[0]
    if text is None or label is None:
        flag = "text" if text is None else "label"
        raise InputError(
            f"{where}: cannot tell which column holds the {flag}; --{flag}-column names it. "
            f"The first line must name the columns; it says {listed(names)}"
        )
    columns = Columns(text, label, pair or None)
    if len(set(columns.wanted)) < len(columns.wanted):
        raise InputError(f"{where}: text, second text and label must be different columns")
    return columns


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for a message."""
    return ", ".join(repr(name) for name in names)


def _guess_texts(
    known: dict[str, str], pair: str | None, label: str | None
) -> tuple[str | None, str | None]:
    for first, second in _PAIRS:
        both = (known.get(first), known.get(second))
        if None not in both and label not in both and pair in (None, both[1]):
            return both
    return _first(known, _TEXTS, {pair, label}), pair


def _first(known: dict[str, str], candidates: Sequence[str], taken: set[str | None]) -> str | None:
    return next(
        (known[name] for name in candidates if name in known and known[name] not in taken), None
    )
