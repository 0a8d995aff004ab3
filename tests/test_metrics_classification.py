from __future__ import annotations

import numpy as np
import pytest

from fastbert.metrics.classification import (
    accuracy,
    confusion_matrix,
    macro_f1,
    majority,
    matthews,
    multi_label_scores,
    per_class,
    per_label,
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_accuracy_is_the_share_of_hits() -> None:
    assert accuracy(ints(0, 1, 2, 2), ints(0, 1, 1, 0)) == 0.5


def test_macro_f1_of_a_case_worked_out_by_hand() -> None:
    # class 0: TP 1, FP 1, FN 1 -> 1/2; class 1: TP 2, FP 0, FN 1 -> 4/5; class 2: TP 1, FP 1 -> 2/3
    predicted, labels = ints(0, 0, 1, 1, 2, 2), ints(0, 1, 1, 1, 2, 0)
    assert macro_f1(predicted, labels) == (1 / 2 + 4 / 5 + 2 / 3) / 3


def test_macro_f1_counts_a_class_never_predicted_as_zero() -> None:
    # class 0: TP 3, FN 0, FP 1 -> 6/7; class 1: 0
    assert macro_f1(ints(0, 0, 0, 0), ints(0, 0, 0, 1)) == (6 / 7) / 2


def test_macro_f1_leaves_out_a_class_that_is_nowhere() -> None:
    assert macro_f1(ints(0, 3), ints(0, 3)) == 1.0


def test_all_wrong_is_zero() -> None:
    assert macro_f1(ints(1, 0), ints(0, 1)) == accuracy(ints(1, 0), ints(0, 1)) == 0.0


def test_majority_is_the_share_of_the_most_frequent() -> None:
    assert majority(ints(2, 2, 0, 2)) == 0.75


@pytest.mark.parametrize("function", [accuracy, macro_f1])
@pytest.mark.parametrize(
    ("predicted", "labels"),
    [(ints(), ints()), (ints(0), ints(0, 1)), (ints(0)[None], ints(0)[None])],
)
def test_shapes_that_do_not_fit_are_refused(function, predicted, labels) -> None:
    with pytest.raises(ValueError, match="at least one"):
        function(predicted, labels)


def close(ours: float, theirs: float) -> bool:
    """Equal but for the order in which fp64 sums were taken."""
    return abs(ours - theirs) <= 64 * np.finfo(np.float64).eps


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 5])
def test_against_scikit_learn(seed, classes) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the test extra")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 97)
    predicted = np.where(rng.random(97) < 0.5, labels, rng.integers(0, classes, 97))
    assert close(accuracy(predicted, labels), metrics.accuracy_score(labels, predicted))
    assert close(macro_f1(predicted, labels), metrics.f1_score(labels, predicted, average="macro"))
    assert close(matthews(predicted, labels), metrics.matthews_corrcoef(labels, predicted))
    ours = confusion_matrix(predicted, labels, classes)
    assert (ours == metrics.confusion_matrix(labels, predicted, labels=range(classes))).all()
    theirs = metrics.precision_recall_fscore_support(labels, predicted, labels=range(classes))
    rows = per_class(predicted, labels, [str(number) for number in range(classes)])
    for number, row in enumerate(rows):
        for value, column in zip(
            (row.precision, row.recall, row.f1, row.support), theirs, strict=True
        ):
            assert close(value, column[number])


@pytest.mark.parametrize("seed", range(3))
def test_label_sets_against_scikit_learn(seed) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the test extra")
    rng = np.random.default_rng(seed)
    labels, predicted = rng.random((2, 61, 6)) < 0.3
    ours = multi_label_scores(predicted, labels)
    assert close(ours["exact"], metrics.accuracy_score(labels, predicted))
    for average in ("micro", "macro"):
        theirs = metrics.f1_score(labels, predicted, average=average)
        assert close(ours[f"{average}_f1"], theirs)
    table = per_label(predicted, labels, list("abcdef"))
    theirs = metrics.precision_recall_fscore_support(labels, predicted)
    assert [row.support for row in table] == theirs[3].tolist()
    assert all(close(row.recall, recall) for row, recall in zip(table, theirs[1], strict=True))


def test_label_sets_without_a_label_anywhere() -> None:
    nothing = np.zeros((3, 2), dtype=bool)
    assert multi_label_scores(nothing, nothing) == {"exact": 1.0, "micro_f1": 0.0, "macro_f1": 0.0}


def test_matthews_of_one_class_is_zero() -> None:
    assert matthews(ints(0, 0), ints(0, 0)) == matthews(ints(0, 0), ints(0, 1)) == 0.0
