"""Rows to score on that were trained on: told, whatever the task."""

from __future__ import annotations

import pytest

from fastbert.tasks.choose import Choices
from fastbert.tasks.conll import Sentence
from fastbert.tasks.groups import Group, Groups
from fastbert.tasks.registry import TASKS, make_task
from fastbert.tasks.semeval import Marked
from fastbert.tasks.squad import Question
from fastbert.tasks.table import Row
from fastbert.tasks.task import say_overlap

# of every task a row, the same with another answer, and one that asks something else
ROWS = {
    "classify": (Row("a", "1", None, 2), Row("a", "0", None, 9), Row("a", "1", "b")),
    "similarity": (Row("a", "1", "b"), Row("a", "2", "b", 5), Row("b", "1", "a")),
    "tag": (
        Sentence(("a", "b"), ("O", "O")),
        Sentence(("a", "b"), ("O", "B-x"), 7),
        Sentence(("a",)),
    ),
    "answer": (
        Question("1", "who?", "she", ("she",), (0,)),
        Question("2", "who?", "she", ("he",), (1,)),
        Question("1", "who?", "he", ("he",), (0,)),
    ),
    "choose": (
        Choices("q", ("a", "b"), 0),
        Choices("q", ("a", "b"), 1, 9),
        Choices("q", ("b", "a"), 0),
    ),
    "relation": (
        Marked("a b", (0, 1), (2, 3), "x"),
        Marked("a b", (0, 1), (2, 3), "y", 5),
        Marked("a b", (2, 3), (2, 3), "x"),
    ),
    "intent": (
        Sentence(("a",), ("O",), intent="x"),
        Sentence(("a",), ("O",), 3, intent="y"),
        Sentence(("b",), ("O",), intent="x"),
    ),
    "embed": (Group(("a", "b")), Group(("a", "b"), 0.5, 4), Group(("a", "c"))),
    "rerank": (Row("q", "1", "p"), Row("q", "0", "p", 3), Row("q", "1", "other")),
}


def test_every_task_has_rows() -> None:
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_the_same_by_what_they_ask(name) -> None:
    one, again, other = ROWS[name]
    task, said = make_task(name), []
    say_overlap(task, "dev", [one], [other], said.append)
    assert said == []
    say_overlap(task, "dev", [one], [again, other], said.append)
    assert said == [f"dev: 1 of 2 {task.noun}s also in the training file"]


def test_a_collection_is_searched_not_answered() -> None:
    said: list[str] = []
    collection = Groups(kind="collection")
    collection.append(Group(("a",)))
    say_overlap(make_task("embed"), "dev", [Group(("a",))], collection, said.append)
    assert said == []


def test_the_public_reviews_overlap(data) -> None:
    folder = data / "classification" / "chnsenticorp"
    if not folder.is_dir():
        pytest.skip(f"the public data at {data} lack classification/chnsenticorp")
    task, said = make_task("classify"), []
    training = task.read(str(folder / "train.tsv"), lambda _: None)
    for name in ("dev", "test"):
        rows = task.read(str(folder / f"{name}.tsv"), lambda _: None)
        say_overlap(task, name, training, rows, said.append)
    assert said == [
        "dev: 338 of 1,200 texts (28.2%) also in the training file",
        "test: 331 of 1,200 texts (27.6%) also in the training file",
    ]
