"""Saved models: what a task starts from, and what it leaves behind for others to ask."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertModel, Model, resolve_model
from fastbert.tasks.inference import TOKEN_BUDGET, mean_of, run
from fastbert.tasks.registry import TASKS, make_task
from fastbert.tasks.sequences import SHORTEST
from fastbert.tasks.task import Raw, Say, Task
from fastbert.tasks.units import Units
from fastbert.tokenizer import Tokenizer

M = TypeVar("M", bound=Model)
TASK_FILE, ENSEMBLE_FILE = "task.json", "ensemble.json"
# what a folder of transformers is for, by the class that it names
_BY_ARCHITECTURE = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
    "ForMultipleChoice": "choose",
    "Model": "embed",
}


def load_with_head(
    architecture: type[M],
    folder: Path,
    task: Task,
    *,
    dropout: float | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[M, list[str]]:
    """A saved model with a head for a task: its own if it has the same, else a fresh one.

    Args:
        architecture: of `fastbert.models`.
        folder: of a model of any kind.
        task: its labels are the head's.
        dropout: of the encoder, and of the head unless config.json has one for it; None for the
            saved model's.
        seed: of fresh weights.
        fields: other fields of the configuration.

    Returns:
        The model, and which of its parts are fresh.

    Raises:
        InputError: missing, damaged or foreign files.
    """
    saved = EncoderConfig.from_pretrained(folder)
    config = dataclasses.replace(saved, labels=list(task.labels), **fields)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    if saved.labels == config.labels and task_of(folder) == task.name:
        model = architecture.from_pretrained(folder, config=config, new_heads=True, seed=seed)
        return model, _parts(model)
    # another task's head may have another shape, or the same shape and another meaning
    body = BertModel.from_pretrained(folder, config=config, new_heads=True, seed=seed)
    model = architecture.from_config(config, seed)
    mine = model.state_dict()
    taken = {
        name: tensor
        for name, tensor in body.state_dict().items()
        if name in mine and _stored_as(model, name) == _stored_as(body, name)
    }
    model.load_state_dict(taken, strict=False)
    fresh = (mine.keys() - taken.keys()) | (mine.keys() & set(body.fresh_parameters))
    return model, sorted({name.partition(".")[0] for name in fresh}, reverse=True)


def load_body(
    folder: Path, task: Task, *, dropout: float | None = None, seed: int = 0
) -> tuple[BertModel, list[str]]:
    """The encoder alone, for heads that transformers does not know; arguments as above."""
    config = dataclasses.replace(EncoderConfig.from_pretrained(folder), labels=list(task.labels))
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    body = BertModel.from_pretrained(folder, config=config, new_heads=True, seed=seed)
    return body, _parts(body)


def task_of(folder: Path) -> str | None:
    """The task that a folder's model was trained for; None where nothing says so."""
    if (folder / TASK_FILE).is_file():
        name = _read_json(folder / TASK_FILE).get("task")
        return name if name in TASKS else None
    raw = _read_json(folder / "config.json")
    named = (raw.get("architectures") or [""])[0]
    found = next((task for end, task in _BY_ARCHITECTURE.items() if named.endswith(end)), None)
    if found == "classify" and raw.get("problem_type") == "regression":
        return "similarity"
    return found


def save_task(task: Task, folder: Path) -> None:
    """Write task.json, which says all that config.json has no field for."""
    with atomic_write(folder / TASK_FILE) as file:
        json.dump(task.facts(), file, indent=2)
        file.write("\n")


def restore_task(folder: Path) -> Task:
    """The task that a folder's model was trained for, as it was then.

    Raises:
        InputError: the folder does not tell, or what it tells does not fit the model.
    """
    config = EncoderConfig.from_pretrained(folder)
    name = task_of(folder)
    if name is None:
        raise InputError(
            f"{folder}: nothing says what this model was trained for: task.json is missing and "
            f"config.json names no class of transformers for one of {', '.join(TASKS)}"
        )
    task = make_task(name)
    path = folder / TASK_FILE
    facts = _read_json(path) if path.is_file() else {}
    raw = _read_json(folder / "config.json")
    if not facts and raw.get("problem_type") == "multi_label_classification":
        facts = {"multi_label": True}
    task.restore(facts, config, str(path))
    _refuse_unfit_length(task.max_seq_len, config, path)
    task.max_seq_len = task.max_seq_len or config.max_seqlen
    return task


def is_task_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a model was fine-tuned, here or with one of transformers' task heads."""
    folder = members(Path(path))[0]
    if (folder / TASK_FILE).is_file():
        return True
    return task_of(folder) not in (None, "embed")


@dataclass(frozen=True)
class Saved:
    """A trained model, or several as an ensemble, with all that is needed to ask it."""

    task: Task
    models: Sequence[nn.Module]
    tokenizer: Tokenizer

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> Saved:
        """Load a run of `fastbert finetune`, or a model folder, also one of transformers.

        Args:
            path: the folder; of a run of several seeds all of them are asked.
            device: where to put the models; None leaves them on the CPU.

        Raises:
            InputError: no model, none of a task, or broken files.
        """
        folders = members(Path(path))
        task = restore_task(folders[0])
        tokenizer = Tokenizer.from_pretrained(folders[0])
        config = EncoderConfig.from_pretrained(folders[0])
        refuse_foreign_tokenizer(tokenizer.vocab_size, config, str(folders[0]))
        models = [task.restore_model(folder).eval() for folder in folders]
        return cls(task, [model.to(device) if device else model for model in models], tokenizer)

    def build(self, rows: Sequence[Any], *, name: str = "", say: Say | None = None) -> Units:
        """Units of rows."""
        return self.task.build(rows, self.tokenizer, name=name, say=say)

    def run(
        self,
        units: Units,
        *,
        dtype: torch.dtype = torch.float32,
        token_budget: int = TOKEN_BUDGET,
        progress: Callable[[int], Any] | None = None,
    ) -> Raw:
        """Outputs, of several models their mean."""
        return mean_of(
            [
                run(
                    self.task,
                    model,
                    units,
                    dtype=dtype,
                    token_budget=token_budget,
                    progress=None if number else progress,
                )
                for number, model in enumerate(self.models)
            ]
        )

    def ask(
        self,
        inputs: Sequence[Any],
        *,
        places: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        token_budget: int = TOKEN_BUDGET,
        say: Say | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[dict[str, Any]]:
        """An answer for each of the inputs, in their order.

        Args:
            inputs: texts, or dictionaries as in a line of jsonl.
            places: where each is from, for an error message; None for its number.
            dtype: of matrix products.
            token_budget: tokens a batch.
            say: told of texts that were cut.
            progress: told how many units are done after each batch.

        Raises:
            InputError: an input that the task cannot read, or weights that are not finite.
        """
        if not len(inputs):
            return []
        if places is None:
            places = [f"inputs:{number}" for number in range(1, len(inputs) + 1)]
        rows = self.task.rows_of(inputs, places)
        units = self.build(rows, say=say)
        raw = self.run(units, dtype=dtype, token_budget=token_budget, progress=progress)
        refuse_non_finite(raw, self.task.name)
        return self.task.answers(rows, units, raw)


def refuse_non_finite(raw: Raw, where: str) -> None:
    """Answers of a broken model are no answers.

    Raises:
        InputError: an output that is not finite.
    """
    parts = [raw.sequences] if raw.sequences is not None else []
    if not all(np.isfinite(part).all() for part in [*parts, *(raw.tokens or [])]):
        raise InputError(f"{where}: the model's weights are not finite")


def members(path: Path) -> list[Path]:
    """The model folders of a run: one, or those of its seeds."""
    listed = path / ENSEMBLE_FILE
    if not listed.is_file():
        return [resolve_model(path)]
    names = _read_json(listed).get("members")
    if not isinstance(names, list) or not names:
        raise InputError(f"{listed}: members must be a list of folders, got {names!r}")
    return [resolve_model(path / str(name)) for name in names]


def _stored_as(model: Model, name: str) -> list[str]:
    """A pooler may be the encoder's in one model of a family, and the head's in another."""
    return model.names.theirs(name, prefixed=False)


def _parts(model: Any) -> list[str]:
    """Modules with weights that the folder lacked."""
    return sorted({name.partition(".")[0] for name in model.fresh_parameters}, reverse=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: unreadable: expected a JSON object")
    return raw


def _refuse_unfit_length(length: Any, config: EncoderConfig, path: Path) -> None:
    positions = config.max_seqlen
    # a model may have fewer positions than that, and is then trained on all of them
    least = min(SHORTEST, positions)
    # bool is a kind of int
    whole = isinstance(length, int) and not isinstance(length, bool)
    if length is not None and not (whole and least <= length <= positions):
        raise InputError(
            f"{path}: max_seq_len must be a whole number from {least} to "
            f"the model's {positions} positions, got {length!r}"
        )
