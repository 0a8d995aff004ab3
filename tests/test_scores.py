from __future__ import annotations

import numpy as np
import pytest

from fastbert.tasks.scores import accuracy, macro_f1, majority


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
