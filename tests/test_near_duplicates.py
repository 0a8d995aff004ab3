from __future__ import annotations

import random

from fastbert.data.near_duplicates import duplicate_groups


def text(seed: int, words: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [f"word{draw.randrange(5000)}" for _ in range(words)]


def test_groups_are_named_by_their_first_text() -> None:
    first, other = text(1), text(2)
    changed = [*first]
    changed[30] = "another"
    texts = [first, other, changed, first[:-2], text(3)]
    assert duplicate_groups([" ".join(words) for words in texts]) == [0, 1, 0, 0, 4]


def test_case_and_punctuation_do_not_count() -> None:
    assert duplicate_groups(["Return the value.", "return THE, value", "Return a value."]) == [
        0,
        0,
        2,
    ]


def test_short_and_empty_texts() -> None:
    assert duplicate_groups(["", "a", "a b", "", "A!", "..."]) == [0, 1, 2, 0, 1, 0]
    assert duplicate_groups([]) == []


def test_half_shared_is_no_duplicate() -> None:
    first, other = text(1), text(2)
    mixed = first[:30] + other[30:]
    assert duplicate_groups([" ".join(first), " ".join(mixed), " ".join(other)]) == [0, 1, 2]


def test_most_of_many_near_duplicates_are_found() -> None:
    originals = [text(seed) for seed in range(200)]
    copies = [[*words[:40], "new", *words[41:]] for words in originals]
    groups = duplicate_groups([" ".join(words) for words in originals + copies])
    assert groups[:200] == list(range(200))
    assert sum(groups[200 + index] == index for index in range(200)) > 190
