from __future__ import annotations

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.metrics.entities import Entity, entities, entity_scores, guess_scheme

KINDS = ("PER", "LOC")


@pytest.mark.parametrize(
    ("tags", "scheme", "expected"),
    [
        ("B-A I-A O B-B", "IOB2", [("A", 0, 2), ("B", 3, 4)]),
        ("B-A B-A I-A", "IOB2", [("A", 0, 1), ("A", 1, 3)]),
        ("I-A I-A B-A O I-B", "IOB1", [("A", 0, 2), ("A", 2, 3), ("B", 4, 5)]),
        ("B-A I-B", "IOB2", [("A", 0, 1), ("B", 1, 2)]),
        ("S-A B-B I-B E-B O", "IOBES", [("A", 0, 1), ("B", 1, 4)]),
        ("U-A B-B I-B L-B", "BILOU", [("A", 0, 1), ("B", 1, 4)]),
        ("B-A M-A M-A E-A S-A", "BMES", [("A", 0, 4), ("A", 4, 5)]),
        # an entity without its end, or of two types, is none
        ("B-A I-A O", "IOBES", []),
        ("B-A E-B", "IOBES", []),
        ("E-A", "BMES", []),
        ("A A O B", None, [("A", 0, 2), ("B", 3, 4)]),
        ("", "IOB2", []),
    ],
)
def test_what_tags_mean(tags, scheme, expected) -> None:
    assert entities(tags.split(), scheme) == [Entity(*entity) for entity in expected]


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["B-A I-A O"], "IOB2"),
        (["I-A I-A O", "O"], "IOB1"),
        (["I-A B-A O"], "IOB1"),
        (["I-A O", "B-A I-A"], "IOB2"),
        (["B-A E-A", "S-B"], "BMES"),
        (["B-A I-A E-A S-B"], "IOBES"),
        (["U-A B-A I-A L-A"], "BILOU"),
        (["NOUN VERB"], None),
        (["O O"], "IOB2"),
    ],
)
def test_schemes_are_told_from_their_tags(sentences, scheme) -> None:
    assert guess_scheme([sentence.split() for sentence in sentences]) == scheme


def test_prefixes_of_no_scheme() -> None:
    with pytest.raises(InputError, match="prefixes B, M, U together"):
        guess_scheme([["B-A", "M-A", "U-A"]])


def drawn(rng: np.random.Generator, prefixes: str) -> list[list[str]]:
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in KINDS)]
    return [rng.choice(tags, int(rng.integers(1, 12))).tolist() for _ in range(40)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BILOU", "BMES"])
def test_against_seqeval(seed, scheme) -> None:
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is in the test extra")
    schemes = pytest.importorskip("seqeval.scheme")
    rng = np.random.default_rng(seed)
    prefixes = {"IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU", "BMES": "BMES"}[scheme]
    there, predicted = drawn(rng, prefixes), []
    for tags in there:
        other = drawn(rng, prefixes)[0] * len(tags)
        keep = rng.random(len(tags)) < 0.7
        predicted.append([t if k else o for t, k, o in zip(tags, keep, other, strict=False)])
    figures, table = entity_scores(
        [entities(tags, scheme) for tags in predicted], [entities(tags, scheme) for tags in there]
    )
    options = {}
    if scheme != "IOB2":
        known = {"IOBES": "IOBES", "BILOU": "BILOU", "BMES": "IOBES"}[scheme]
        options = {"mode": "strict", "scheme": getattr(schemes, known)}
    theirs = [
        [[tag.replace("M-", "I-") for tag in tags] for tags in tagged]
        for tagged in (there, predicted)
    ]
    assert 0 < figures["f1"] < 1
    eps = 64 * np.finfo(np.float64).eps
    for name in ("precision", "recall", "f1"):
        expected = getattr(metrics, f"{name}_score")(*theirs, **options)
        assert abs(figures[name] - expected) <= eps
    by_type = metrics.classification_report(*theirs, output_dict=True, **options)
    for row in table:
        assert row.support == by_type[row.name]["support"]
        assert abs(row.f1 - by_type[row.name]["f1-score"]) <= eps
