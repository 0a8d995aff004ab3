"""Several models of one architecture to one: the mean of their weights.

Of neighbouring checkpoints of a run (Vaswani et al. 2017, section 6.1), or of models fine-tuned
from the same one (Wortsman et al. 2022, arXiv:2203.05482).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fastbert.checkpoint import NameMap, read_weights, to_hugging_face, weights_files, write_weights
from fastbert.config import EncoderConfig
from fastbert.data.objectives import Objective
from fastbert.errors import InputError
from fastbert.files import writing_failed
from fastbert.models import resolve_model
from fastbert.training.state import checkpoint_weights, checkpoints


def average(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    last: int | None = None,
) -> str:
    """Write the mean of several models' weights as a model folder.

    Args:
        models: model folders, or runs, of one architecture; a single run stands for its
            checkpoints.
        out: a new folder; gets the first model's configuration and vocabulary.
        last: newest checkpoints of a single run to take; None for all that are kept.

    Returns:
        What it is the mean of, in words.

    Raises:
        InputError: nothing to average, other sizes, or a folder that is taken.
    """
    target = Path(out)
    if target.exists():
        raise InputError(f"--out {out}: is there already; name a new folder")
    folder = resolve_model(models[0])
    if len(models) == 1:
        found = _of_run(Path(models[0]), folder, last)
        names = [path.name for path in found]
        states = (_by_hugging_face(path, folder) for path in found)
    else:
        if last is not None:
            raise InputError("--last: counts the checkpoints of one run; several models are given")
        folders = [resolve_model(model) for model in models]
        names = [str(model) for model in models]
        states = (read_weights(own) for own in folders)
    mean = _mean(states, names)
    _write(folder, target, mean)
    if len(models) == 1:
        return f"{len(names)} checkpoints, {names[0]} to {names[-1]}"
    return f"{len(names)} models"


def _of_run(run: Path, folder: Path, last: int | None) -> list[Path]:
    kept = checkpoints(run)
    if last is not None and not 1 < last <= len(kept):
        raise InputError(
            f"--last must be 2 to {len(kept)}, the checkpoints that {run} keeps, got {last}"
            if len(kept) > 1
            else f"--last {last}: {run} keeps {len(kept)} checkpoints; pretrain keeps some with "
            "--keep-checkpoints"
        )
    if len(kept) < 2:
        raise InputError(
            f"{run}: nothing to average: name two models or more, or a run with checkpoints "
            "(pretrain --keep-checkpoints)"
        )
    return kept[-(last or len(kept)) :]


def _by_hugging_face(path: Path, folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights by the names of the model folder beside it."""
    config = EncoderConfig.from_pretrained(folder)
    objective, _ = Objective.load(folder)
    architecture = "BertForPreTraining" if objective.pair else "BertForMaskedLM"
    return to_hugging_face(checkpoint_weights(path), NameMap.of(config, architecture))


def _mean(states: Iterator[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """Summed in fp64, one model in memory at a time."""
    first = next(states)
    sums = {name: tensor.double() for name, tensor in first.items()}
    for where, state in zip(names[1:], states, strict=True):
        if state.keys() != sums.keys():
            name = min(state.keys() ^ sums.keys())
            raise InputError(f"{where}: {name} is in it or in {names[0]}, but not in both")
        for name, tensor in state.items():
            if tensor.shape != sums[name].shape:
                raise InputError(
                    f"{where}: {name} has shape {list(tensor.shape)}, in {names[0]} "
                    f"{list(sums[name].shape)}"
                )
            sums[name] += tensor.double()
    return {name: (total / len(names)).to(first[name].dtype) for name, total in sums.items()}


def _write(folder: Path, target: Path, weights: dict[str, Tensor]) -> None:
    own = {path.name for path in weights_files(folder)}
    try:
        target.mkdir(parents=True)
        for path in sorted(folder.iterdir()):
            # an index would name weights in pieces, which are not written here
            if path.is_file() and path.name not in own and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise writing_failed(target, error) from error
    write_weights(target, weights)
