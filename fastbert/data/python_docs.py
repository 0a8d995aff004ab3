"""Real text without a download: the docstrings of the user's own Python installation.

Source files of the standard library, torch, numpy, sympy and networkx are read with `ast`; no
module is imported. The labelled task made from them asks which library a docstring documents.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import json
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert.data.near_duplicates import duplicate_groups
from fastbert.errors import InputError
from fastbert.files import atomic_write

LIBRARIES = ("python", "torch", "numpy", "sympy", "networkx")

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_STATEMENT_LISTS = ("body", "orelse", "handlers", "finalbody")

_IMPORT_LINE = re.compile(
    r"""^[ \t]*(?:>>>|\.\.\.)?[ \t]*
    (?:from[ \t]+[\w.]+[ \t]+import\b.*
    |import[ \t]+[\w.]+(?:[ \t]+as[ \t]+\w+)?(?:,.*)?[ \t]*;?)$""",
    re.MULTILINE | re.VERBOSE,
)
# a name inside an identifier gives the answer away too (`__torch_function__`, `to_numpy_array`)
_LIBRARY_NAME = re.compile(
    r"(?<![A-Za-z0-9])(?:c?python\d?|(?:py)?torch[a-z0-9]*|numpy|np|sympy|networkx|nx)"
    r"(?![A-Za-z0-9])(?:\.(?=\w))?",
    re.IGNORECASE,
)
_MINIMUM_WORDS = 8
# hand-wrapped lines are longer than this; shorter ones ended where they wanted to
_WRAPPED_FROM = 50
_PROMPT = re.compile(r"\s*(?:>>>|\.\.\.)")
# prompts, list items, numbers, fields, directives, table rows and rules begin a line of their own
_OWN_LINE = re.compile(r"\s*(?:>>>|\.\.\.|[-*+•]\s|\d+[.)]\s|:\w|\.\. |\||={3,}|-{3,})")


@dataclass(frozen=True)
class PyDoc:
    """One docstring and where it stands."""

    text: str  # cleaned with inspect.cleandoc
    library: str  # one of LIBRARIES
    module: str  # dotted, e.g. "torch.nn.functional"
    name: str  # qualified name inside the module, "" for the module itself


@dataclass(frozen=True)
class LabelledTask:
    """Which library does this docstring document?"""

    labels: tuple[str, ...]
    train: list[tuple[str, str]]  # (text with the library names blanked, label)
    evaluation: list[tuple[str, str]]
    evaluation_docs: frozenset[int]  # indices of evaluation documents and their near-duplicates


def collect(*, say: Callable[[str], None] = print) -> list[PyDoc]:
    """Every different docstring of the five libraries, in an order that does not vary.

    Args:
        say: told which library is not installed and how many files could not be read.

    Returns:
        documents ordered by library (as in LIBRARIES), module and line; of equal texts the first.
    """
    docs: dict[str, PyDoc] = {}
    unreadable = 0
    for library in LIBRARIES:
        folder = _library_folder(library)
        if folder is None:
            say(f"python-docs: {library} is not installed, its docstrings are left out")
            continue
        for module, path in sorted(_source_files(folder, library)):
            found = _read_module(path, library, module)
            if found is None:
                unreadable += 1
                continue
            for doc in found:
                docs.setdefault(doc.text, doc)
    if unreadable:
        files = "1 source file" if unreadable == 1 else f"{unreadable} source files"
        them = "it" if unreadable == 1 else "them"
        say(f"python-docs: {files} skipped: this Python cannot parse {them}")
    return list(docs.values())


def write_jsonl(docs: Sequence[PyDoc], path: str | os.PathLike[str]) -> None:
    """Write one JSON object a line: text, label (the library), module, name."""
    with atomic_write(path) as file:
        for doc in docs:
            record = {
                "text": doc.text,
                "label": doc.library,
                "module": doc.module,
                "name": doc.name,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def blank_library_names(text: str) -> str:
    """The text without import lines and without any of the libraries' names and aliases."""
    return _LIBRARY_NAME.sub("", _IMPORT_LINE.sub("", text)).strip()


def labelled_task(
    docs: Sequence[PyDoc], *, train_size: int = 500, eval_size: int = 2000, seed: int = 0
) -> LabelledTask:
    """Draw a five-class task with the natural class proportions.

    Near-duplicates are one document; those that two libraries share, and texts under 8 words, are
    left out.

    Raises:
        InputError: fewer usable documents than `train_size + eval_size`.
    """
    blanked = [blank_library_names(doc.text) for doc in docs]
    groups = duplicate_groups(blanked)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    pool = [
        same[0]
        for same in members.values()
        if len(blanked[same[0]].split()) >= _MINIMUM_WORDS
        and len({docs[index].library for index in same}) == 1
    ]
    wanted = train_size + eval_size
    if len(pool) < wanted:
        raise InputError(
            f"python-docs: the labelled task needs {wanted} different documents, "
            f"got {len(pool)}; ask for fewer"
        )
    chosen = random.Random(seed).sample(pool, wanted)
    evaluation = chosen[train_size:]
    return LabelledTask(
        labels=tuple(label for label in LIBRARIES if any(doc.library == label for doc in docs)),
        train=[(blanked[index], docs[index].library) for index in chosen[:train_size]],
        evaluation=[(blanked[index], docs[index].library) for index in evaluation],
        evaluation_docs=frozenset(i for index in evaluation for i in members[groups[index]]),
    )


def pretraining_texts(docs: Sequence[PyDoc], task: LabelledTask) -> list[str]:
    """The texts that are neither in the task's evaluation nor near-duplicates of it.

    Lines that were wrapped by hand are joined, so that a line end is a sentence's.
    """
    return [
        join_wrapped_lines(doc.text)
        for index, doc in enumerate(docs)
        if index not in task.evaluation_docs
    ]


def join_wrapped_lines(text: str) -> str:
    """The text with each line that goes on in the next joined to it.

    A line goes on where it is long, does not end in a colon and is no prompt, and the next has
    the same indentation (or hangs under a list item) and begins no item, prompt, field or rule.
    """
    lines: list[str] = []
    before = ""
    for line in text.split("\n"):
        deeper = _indentation(line) - _indentation(before)
        hangs = deeper == 0 or (deeper > 0 and _OWN_LINE.match(before) is not None)
        goes_on = (
            len(before) >= _WRAPPED_FROM
            and not before.rstrip().endswith(":")
            and not _PROMPT.match(before)
        )
        if goes_on and hangs and line.strip() and not _OWN_LINE.match(line):
            lines[-1] = f"{lines[-1].rstrip()} {line.strip()}"
        else:
            lines.append(line)
        before = line
    return "\n".join(lines)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _library_folder(library: str) -> Path | None:
    if library == "python":
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(library)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _source_files(folder: Path, library: str) -> Iterator[tuple[str, Path]]:
    for where, folders, files in os.walk(folder):
        below = Path(where).relative_to(folder).parts
        skipped = _SKIPPED_FOLDERS | ({"_internal"} if below == ("testing",) else set())
        folders[:] = [name for name in folders if name not in skipped]
        for name in files:
            if name.endswith(".py"):
                stem = () if name == "__init__.py" else (name[:-3],)
                top = () if library == "python" else (library,)
                yield ".".join((*top, *below, *stem)), Path(where, name)


def _read_module(path: Path, library: str, module: str) -> list[PyDoc] | None:
    try:
        source = path.read_bytes()
    except OSError:
        return None
    # parsing is where the time goes
    if b'"""' not in source and b"'''" not in source:
        return []
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            # other people's invalid escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collecting:
            gc.enable()
    return [PyDoc(text, library, module, name) for name, text in _docstrings(tree, "")]


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _DOCUMENTED):
        if not isinstance(node, ast.Module):
            name = f"{name}.{node.name}" if name else node.name
        raw = ast.get_docstring(node, clean=False)
        # an escaped half of a surrogate pair is no text that could be written down
        text = inspect.cleandoc(raw).strip().encode("utf-8", "ignore").decode() if raw else ""
        if text:
            yield name, text
    for field in _STATEMENT_LISTS:
        for child in getattr(node, field, ()):
            yield from _docstrings(child, name)
