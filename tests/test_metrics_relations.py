from __future__ import annotations

from fastbert.metrics.relations import relation_scores


def test_direction_counts_and_other_is_left_out() -> None:
    there = ["A(e1,e2)", "A(e2,e1)", "A(e1,e2)", "B(e1,e2)", "Other", "Other"]
    predicted = ["A(e1,e2)", "A(e1,e2)", "Other", "B(e1,e2)", "B(e2,e1)", "Other"]
    figures, table = relation_scores(predicted, there)
    # A: 1 right of 2 named and 3 there; B: 1 right of 2 named and 1 there
    assert [(row.name, row.precision, row.recall, row.support) for row in table] == [
        ("A", 1 / 2, 1 / 3, 3),
        ("B", 1 / 2, 1.0, 1),
    ]
    assert figures["macro_f1"] == (2 / 5 + 2 / 3) / 2
    assert figures["accuracy"] == 3 / 6


def test_a_wrong_direction_everywhere_scores_nothing() -> None:
    figures, _ = relation_scores(["A(e2,e1)"] * 3, ["A(e1,e2)"] * 3)
    assert figures["macro_f1"] == 0.0
