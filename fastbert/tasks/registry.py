"""The tasks by name, each loaded when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastbert.errors import InputError
from fastbert.tasks.task import Task

# name of the command -> module and class
TASKS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "classify": ("fastbert.tasks.classify", "Classify"),
        "similarity": ("fastbert.tasks.similarity", "Similarity"),
        "tag": ("fastbert.tasks.tag", "Tag"),
        "answer": ("fastbert.tasks.answer", "Answer"),
        "choose": ("fastbert.tasks.choose", "Choose"),
        "relation": ("fastbert.tasks.relation", "Relation"),
        "intent": ("fastbert.tasks.intent", "Intent"),
        "embed": ("fastbert.tasks.embed", "Embed"),
        "rerank": ("fastbert.tasks.rerank", "Rerank"),
    }
)


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        InputError: no task has this name.
    """
    if name not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, of = TASKS[name]
    found: type[Task] = getattr(importlib.import_module(module), of)
    return found


def make_task(name: str, **options: Any) -> Task:
    """A task with these options, the others at their defaults."""
    return task_class(name)(**options)
