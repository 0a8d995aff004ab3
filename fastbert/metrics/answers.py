"""Scores of extractive question answering by the rules of SQuAD (Rajpurkar et al. 2016, 2018).

Answers are compared in lower case, without ASCII punctuation, without the articles a, an and the,
and with single spaces. A question's score is the best over its reference answers. In version 2 a
question may have none, and then the empty answer alone is right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(answer: str) -> str:
    """The form in which answers are compared."""
    bare = "".join(char for char in answer.lower() if char not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(predicted: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, else 0; no reference means no answer."""
    return float(normalise(predicted) in map(normalise, _usable(references)))


def overlap_f1(predicted: str, references: Sequence[str]) -> float:
    """The best F1 over bags of words; where one of both is empty, 1 only if both are."""
    return max(_overlap(normalise(predicted), normalise(answer)) for answer in _usable(references))


def _usable(references: Sequence[str]) -> list[str]:
    # a reference of nothing but an article would be met by silence
    return [answer for answer in references if normalise(answer)] or [""]


def _overlap(predicted: str, reference: str) -> float:
    ours, theirs = predicted.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def answer_scores(
    predicted: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Exact match and F1 over all questions, and apart where some have no answer.

    Args:
        predicted: an answer a question, "" for none.
        references: the accepted answers of each; none where there is no answer.

    Returns:
        exact_match and f1, shares; with unanswerable questions also exact_match and f1 of those
        that have an answer (`has_answer_`), and the accuracy on those that have none.
    """
    exact = np.array([exact_match(*pair) for pair in zip(predicted, references, strict=True)])
    overlap = np.array([overlap_f1(*pair) for pair in zip(predicted, references, strict=True)])
    figures = {"exact_match": float(exact.mean()), "f1": float(overlap.mean())}
    has_answer = np.array([any(map(normalise, answers)) for answers in references])
    if not has_answer.all() and has_answer.any():
        figures["has_answer_exact_match"] = float(exact[has_answer].mean())
        figures["has_answer_f1"] = float(overlap[has_answer].mean())
        figures["no_answer_accuracy"] = float(exact[~has_answer].mean())
    return figures


def best_null_threshold(
    null_margins: np.ndarray, scores: np.ndarray, has_answer: np.ndarray
) -> float:
    """The threshold on "score of no answer less score of the best answer" that scores best.

    Args:
        null_margins: [questions]; a question is left unanswered where its margin exceeds the
            threshold.
        scores: [questions], what the best answer would score (exact match or F1).
        has_answer: [questions] bool.
    """
    order = np.argsort(null_margins, kind="stable")
    # answering the k questions of the lowest margins, and none of the others
    gain = np.where(has_answer, scores, -1.0)[order]
    totals = np.concatenate([[0.0], np.cumsum(gain)])
    margins = null_margins[order]
    # equal margins are answered together
    possible = np.concatenate([[True], margins[1:] > margins[:-1], [True]])
    best = int(np.argmax(np.where(possible, totals, -np.inf)))
    if best == 0:
        return float(margins[0] - 1.0)
    return float(margins[best - 1])
