from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastbert.data import python_docs
from fastbert.data.python_docs import (
    LIBRARIES,
    PyDoc,
    blank_library_names,
    collect,
    join_wrapped_lines,
    labelled_task,
    pretraining_texts,
    write_jsonl,
)
from fastbert.errors import InputError

SOURCE = '''"""Module text."""
import something_that_is_not_there


class Outer(object):
    """Outer text.

        indented
    and not
    """

    def method(self):
        """Same text."""

        def inner():
            """Inner text."""


try:
    async def other():
        """Same text."""
except ImportError:
    def fallback():
        """Fallback text."""
'''


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two libraries with known source files, three that are missing."""
    folders = {"python": tmp_path / "lib", "torch": tmp_path / "torch"}
    files = {
        "lib/b.py": SOURCE,
        "lib/a/__init__.py": "def first():\n    '''First of all.'''\n",
        "lib/test/test_a.py": '"""A test."""\n',
        "lib/site-packages/c.py": '"""Foreign."""\n',
        "lib/broken.py": 'def broken(:\n    """No."""\n',
        "lib/latin.py": b'# -*- coding: latin-1 -*-\n"""Caf\xe9."""\n',
        "torch/__init__.py": '"""Module text."""\n',
        "torch/nn.py": 'x = """no docstring"""\ndef f():\n    """Of \\ud800torch\\."""\n',
        "torch/testing/_internal/a.py": '"""Internal."""\n',
        "torch/testing/b.py": '"""Public testing."""\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(python_docs, "_library_folder", folders.get)
    return tmp_path


def test_collect_reads_sorts_and_de_duplicates(small: Path) -> None:
    said: list[str] = []
    docs = collect(say=said.append)
    assert docs == [
        PyDoc("First of all.", "python", "a", "first"),
        PyDoc("Module text.", "python", "b", ""),
        PyDoc("Outer text.\n\n    indented\nand not", "python", "b", "Outer"),
        PyDoc("Same text.", "python", "b", "Outer.method"),
        PyDoc("Inner text.", "python", "b", "Outer.method.inner"),
        PyDoc("Fallback text.", "python", "b", "fallback"),
        PyDoc("Café.", "python", "latin", ""),
        PyDoc("Of torch\\.", "torch", "torch.nn", "f"),
        PyDoc("Public testing.", "torch", "torch.testing.b", ""),
    ]
    assert said == [
        *(
            f"python-docs: {library} is not installed, its docstrings are left out"
            for library in ("numpy", "sympy", "networkx")
        ),
        "python-docs: 1 source file skipped: this Python cannot parse it",
    ]


def test_write_jsonl(small: Path) -> None:
    docs = collect(say=lambda line: None)
    write_jsonl(docs, small / "docs.jsonl")
    records = [json.loads(line) for line in (small / "docs.jsonl").read_bytes().splitlines()]
    assert records[3] == {
        "text": "Same text.",
        "label": "python",
        "module": "b",
        "name": "Outer.method",
    }
    assert [record["text"] for record in records] == [doc.text for doc in docs]


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "booby_trap"
    package.mkdir()
    (package / "__init__.py").write_text('"""Text."""\nraise SystemExit\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert python_docs._library_folder("booby_trap") == package
    monkeypatch.setattr(python_docs, "LIBRARIES", ("booby_trap",))
    assert collect() == [PyDoc("Text.", "booby_trap", "booby_trap", "")]
    assert "booby_trap" not in sys.modules
    assert python_docs._library_folder("no_such_library") is None


@pytest.mark.parametrize(
    ("text", "blanked"),
    [
        ("Use np.array or numpy.array, not torch.tensor.", "Use array or array, not tensor."),
        ("A PyTorch module, in Python.", "A  module, in ."),
        ("The __torch_function__ of nx-graphs", "The ___function__ of -graphs"),
        (">>> import sympy as sp\n>>> sp.x\nfrom a.b import c\nText", ">>> sp.x\n\nText"),
        ("import tensors from disk", "import tensors from disk"),
        ("Important: sympify, inputs, pythonic", "Important: sympify, inputs, pythonic"),
    ],
)
def test_blank_library_names(text: str, blanked: str) -> None:
    assert blank_library_names(text) == blanked


def invented(count: int) -> list[PyDoc]:
    docs = [
        PyDoc(
            " ".join(f"w{index * 31 + word}" for word in range(12)) + f" of {library}",
            library,
            "m",
            str(index),
        )
        for index, library in zip(range(count), list(LIBRARIES) * count, strict=False)
    ]
    copy = docs[0]
    return [
        *docs,
        PyDoc(copy.text.upper() + " again", copy.library, "m", "near"),
        PyDoc("too short", "numpy", "m", "short"),
    ]


def test_labelled_task_keeps_its_evaluation_out_of_pretraining() -> None:
    docs = invented(60)
    seen_in_evaluation = 0
    for seed in range(6):
        task = labelled_task(docs, train_size=20, eval_size=40, seed=seed)
        assert (len(task.train), len(task.evaluation)) == (20, 40)
        assert task.labels == LIBRARIES
        texts = {text for text, _ in task.train} | {text for text, _ in task.evaluation}
        assert len(texts) == 60 and "too short" not in texts
        remaining = pretraining_texts(docs, task)
        evaluation = {text for text, _ in task.evaluation}
        assert not evaluation & {blank_library_names(text) for text in remaining}
        assert len(remaining) == len(docs) - len(task.evaluation_docs)
        first_held = 0 in task.evaluation_docs
        assert first_held == (60 in task.evaluation_docs)
        seen_in_evaluation += first_held
        for text, label in task.train + task.evaluation:
            assert label in LIBRARIES and label not in text
    assert 0 < seen_in_evaluation < 6


def test_labelled_task_is_seeded() -> None:
    docs = invented(60)
    first = labelled_task(docs, train_size=20, eval_size=30, seed=1)
    assert labelled_task(docs, train_size=20, eval_size=30, seed=1) == first
    assert labelled_task(docs, train_size=20, eval_size=30, seed=2).train != first.train


def test_text_that_two_libraries_share_is_in_no_task() -> None:
    docs = invented(20)
    docs.append(PyDoc(docs[1].text + " indeed", "numpy", "m", "shared"))
    for seed in range(4):
        task = labelled_task(docs, train_size=9, eval_size=10, seed=seed)
        assert blank_library_names(docs[1].text) not in {t for t, _ in task.train + task.evaluation}


def test_too_few_documents() -> None:
    with pytest.raises(InputError, match="needs 100 different documents, got 60"):
        labelled_task(invented(60), train_size=50, eval_size=50)


@pytest.mark.slow
def test_the_real_installation() -> None:
    docs = collect()
    assert len({doc.text for doc in docs}) == len(docs)
    size = sum(len(doc.text.encode()) for doc in docs)
    assert 10e6 < size < 25e6
    assert {doc.library for doc in docs} == set(LIBRARIES)
    task = labelled_task(docs)
    majority = Counter(label for _, label in task.evaluation).most_common(1)[0][1]
    assert 0.3 < majority / len(task.evaluation) < 0.5
    words = {label: set() for label in LIBRARIES}
    for text, label in task.train + task.evaluation:
        words[label] |= set(re.findall("[a-z0-9]+", text.lower()))
    assert not any(set(LIBRARIES) & found for found in words.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "A sentence that is long enough to have been wrapped by\nhand goes on here.",
            "A sentence that is long enough to have been wrapped by hand goes on here.",
        ),
        ("Short line.\nAnother one.", "Short line.\nAnother one."),
        (
            "- an item whose text is so long that it hangs over into the\n  next line\n- next",
            "- an item whose text is so long that it hangs over into the next line\n- next",
        ),
        (
            ">>> a_call_with_a_long_name(and_an_argument, and_another_one)\nits result",
            ">>> a_call_with_a_long_name(and_an_argument, and_another_one)\nits result",
        ),
        (
            "what follows this long introduction is indented differently\n    code()",
            "what follows this long introduction is indented differently\n    code()",
        ),
        (
            "the following parameters are all that this function will take:\nx is a number",
            "the following parameters are all that this function will take:\nx is a number",
        ),
    ],
)
def test_only_lines_wrapped_by_hand_are_joined(text: str, expected: str) -> None:
    assert join_wrapped_lines(text) == expected
