from __future__ import annotations

import numpy as np
import pytest

from fastbert.metrics.answers import (
    answer_scores,
    best_null_threshold,
    exact_match,
    normalise,
    overlap_f1,
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Broncos!", "broncos"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("the", ""),
        ("“quoted”", "“quoted”"),
        # the article is taken out after the punctuation, as the published script does
        ("a-b", "ab"),
    ],
)
def test_the_form_in_which_answers_are_compared(answer, expected) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("predicted", "references", "exact", "overlap"),
    [
        ("the Broncos", ["Broncos", "Denver Broncos"], 1.0, 1.0),
        ("Denver", ["Broncos", "Denver Broncos"], 0.0, 2 / 3),
        ("red red blue", ["red blue green"], 0.0, 4 / 6),
        ("", [], 1.0, 1.0),
        ("Denver", [], 0.0, 0.0),
        ("", ["Denver"], 0.0, 0.0),
        # a reference of nothing but an article counts as none
        ("", ["the"], 1.0, 1.0),
    ],
)
def test_one_question(predicted, references, exact, overlap) -> None:
    assert exact_match(predicted, references) == exact
    assert overlap_f1(predicted, references) == overlap


def test_questions_without_answers_are_scored_apart() -> None:
    figures = answer_scores(["a cat", "", "dog"], [["cat"], [], []])
    assert figures == {
        "exact_match": 2 / 3,
        "f1": 2 / 3,
        "has_answer_exact_match": 1.0,
        "has_answer_f1": 1.0,
        "no_answer_accuracy": 0.5,
    }
    assert answer_scores(["cat"], [["cat"]]) == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_of_all(seed) -> None:
    rng = np.random.default_rng(seed)
    margins = rng.integers(-4, 5, 12).astype(np.float64)
    has_answer = rng.random(12) < 0.5
    scores = np.where(has_answer, rng.random(12), 0.0)

    def total(threshold: float) -> float:
        answered = margins <= threshold
        return float(np.where(answered, np.where(has_answer, scores, 0.0), ~has_answer).sum())

    ours = total(best_null_threshold(margins, scores, has_answer))
    assert ours == max(total(threshold) for threshold in [-9.0, *margins.tolist()])
