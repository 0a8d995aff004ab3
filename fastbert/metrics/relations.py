"""The official score of SemEval-2010 task 8 (Hendrickx et al. 2010): macro-F1 with direction.

Labels are "Relation(e1,e2)", "Relation(e2,e1)" or "Other". Precision and recall of a relation count
both directions together, a pair in the wrong direction being wrong; the score is the mean of F1
over the relations, "Other" left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbert.metrics.classification import ClassScore, f1

OTHER = "Other"


def relation_of(label: str) -> str:
    """The relation without its direction."""
    return label.partition("(")[0]


def relation_scores(
    predicted: Sequence[str], there: Sequence[str]
) -> tuple[dict[str, float], list[ClassScore]]:
    """Macro-F1 (and precision and recall) with direction, accuracy, and a table by relation.

    Args:
        predicted, there: one label an example; relations are those that occur in `there`.
    """
    relations = sorted({relation_of(label) for label in there} - {OTHER})
    table = []
    for relation in relations:
        said = sum(relation_of(label) == relation for label in predicted)
        true = sum(relation_of(label) == relation for label in there)
        hits = sum(
            ours == theirs and relation_of(ours) == relation
            for ours, theirs in zip(predicted, there, strict=True)
        )
        table.append(ClassScore(relation, *f1(hits, said, true), true))
    right = sum(ours == theirs for ours, theirs in zip(predicted, there, strict=True))
    count = max(len(table), 1)
    return {
        "macro_f1": sum(row.f1 for row in table) / count,
        "macro_precision": sum(row.precision for row in table) / count,
        "macro_recall": sum(row.recall for row in table) / count,
        "accuracy": right / max(len(there), 1),
    }, table
