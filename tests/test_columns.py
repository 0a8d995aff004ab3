from __future__ import annotations

import pytest

from fastbert.errors import InputError
from fastbert.tasks.columns import Columns, guess_columns


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sentence", "label"], Columns("sentence", "label")),
        (["label", "text_a"], Columns("text_a", "label")),
        (["index", "sentence1", "sentence2", "label"], Columns("sentence1", "label", "sentence2")),
        (["label", "text_a", "text_b"], Columns("text_a", "label", "text_b")),
        (["premise", "hypothesis", "gold_label"], Columns("premise", "gold_label", "hypothesis")),
        (
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
            Columns("#1 String", "Quality", "#2 String"),
        ),
        (
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            Columns("question1", "is_duplicate", "question2"),
        ),
        (["index", "question", "sentence", "label"], Columns("question", "label", "sentence")),
        (["Text", "Label"], Columns("Text", "Label")),
        (["text", "label", "module", "name"], Columns("text", "label")),
        # the only column left is the other one, unless it is a number of the row
        (["utterances", "intent"], Columns("utterances", "intent")),
        (["id", "review", "stars"], Columns("review", "stars")),
    ],
)
def test_guesses(names, expected) -> None:
    assert guess_columns(names) == expected


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["sentence", "a", "b"], {"label": "b"}, Columns("sentence", "b")),
        (["a", "b", "label"], {"text": "b"}, Columns("b", "label")),
        (["a", "b", "label"], {"text": "b", "pair": "a"}, Columns("b", "label", "a")),
        (["sentence1", "sentence2", "label"], {"text": "sentence1"}, Columns("sentence1", "label")),
        (
            ["sentence1", "sentence2", "label"],
            {"pair": "sentence2"},
            Columns("sentence1", "label", "sentence2"),
        ),
        (["text", "label", "class"], {"label": "class"}, Columns("text", "class")),
        (["text", "label"], {"text": "label", "label": "text"}, Columns("label", "text")),
    ],
)
def test_what_is_given_stays(names, given, expected) -> None:
    assert guess_columns(names, **given) == expected


@pytest.mark.parametrize(
    ("names", "flag"),
    [
        # what a file without a header has in its first line
        (["a great film", "1"], "text"),
        (["index", "sentence"], "label"),
        (["index", "sentence1", "sentence2"], "label"),
        (["a", "b", "label"], "text"),
        (["text", "a", "b"], "label"),
        (["", "text"], "label"),
    ],
)
def test_what_cannot_be_told_is_asked_for(names, flag) -> None:
    with pytest.raises(InputError, match=f"f.csv: cannot tell .* --{flag}-column names it"):
        guess_columns(names, where="f.csv")


def test_one_column_cannot_serve_twice() -> None:
    with pytest.raises(InputError, match="must be different columns"):
        guess_columns(["text", "label"], text="text", label="text")
