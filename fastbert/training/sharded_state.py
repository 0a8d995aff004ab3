"""Checkpoints of a model in shards: each rank writes its parts, any number of ranks reads them.

torch.distributed.checkpoint, its tensors in safetensors files: nothing is unpickled. As with a
checkpoint in one piece, a folder takes its name only once it is whole, and is checksummed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.files import writing_failed
from fastbert.training.optimizer import Optimizers
from fastbert.training.parallel import Ranks
from fastbert.training.shards import assembled, part
from fastbert.training.state import (
    KEPT,
    Keeper,
    Saved,
    TrainState,
    as_os_error,
    checkpoint_path,
    finish_checkpoint,
    finish_folder,
    intact_checkpoint,
    load_checkpoint,
    raw_state,
    save_checkpoint,
)

SHARDS = "shards"
_MODEL, _OPTIMIZER, _KEEPER = "model/", "optimizer/", "keeper/"
# what the first rank tells the others in place of a checkpoint's number
_NONE, _DAMAGED = -1, -2


def save_run(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizers: Optimizers,
    ranks: Ranks,
    *,
    wait: bool = True,
    keeper: Keeper | None = None,
    kept: int = KEPT,
) -> None:
    """`save_checkpoint` by the first rank, or where the model is sharded by all of them at once.

    Args:
        folder: of the run; where the model is sharded, one that all ranks see.
        state, model, optimizers: what is written.
        ranks: all of them call this.
        wait: as for `save_checkpoint`; of shards too, threads of all ranks write copies made now.
        keeper: is written too; of a sharded model, its tensors are this rank's parts.
        kept: as for `save_checkpoint`.

    Raises:
        InputError: on every rank, where any could not write.
    """
    if not ranks.sharded:
        if ranks.first:
            save_checkpoint(folder, state, model, optimizers, wait=wait, keeper=keeper, kept=kept)
        return
    try:
        finish_shards(ranks)
    except InputError:
        # who waits for this one wants it written, whatever became of the one before
        if not wait:
            raise
    target = checkpoint_path(folder, state.groups)
    if ranks.told(int(target.exists())):
        return
    partial = _partial(target)
    with _together(ranks, target):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / SHARDS).mkdir(parents=True)
    try:
        with _together(ranks, target):
            tensors = _tensors(model, optimizers)
            if keeper is not None:
                for name, own in keeper.state_tensors().items():
                    tensors[_KEEPER + name] = assembled(own, tensors[name])
            ranks.writing = _Writing(target, tensors, raw_state(state, keeper), kept, ranks)
    except BaseException:
        ranks.writing = None
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    ranks.writing.start()
    if wait:
        finish_shards(ranks)


def finish_shards(ranks: Ranks) -> None:
    """Wait for a checkpoint in shards that is being written; all ranks call this.

    Raises:
        InputError: on every rank, where any could not write.
    """
    writing = ranks.writing
    if isinstance(writing, _Writing):
        with _together(ranks, writing.target):
            writing.join()
            # an interruption while it joins leaves it to whoever closes
            ranks.writing = None
            if writing.failure is not None:
                raise writing.failure


def finish_writing(ranks: Ranks, say: Callable[[str], None]) -> None:
    """Wait for what this rank still writes, whatever ended the run, and say what it could not."""
    try:
        finish_checkpoint()
    except InputError as failure:
        say(str(failure))
    writing = ranks.writing
    if isinstance(writing, _Writing):
        writing.join()
        if writing.failure is not None:
            say(str(_told(writing.target, writing.failure)))


class _Writing(threading.Thread):
    """Writes copies of this rank's parts, made at once; the first rank's names the folder."""

    def __init__(
        self,
        target: Path,
        tensors: dict[str, Tensor],
        raw: dict[str, Any],
        kept: int,
        ranks: Ranks,
    ) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        super().__init__(name="checkpoint")
        self.target, self.raw, self.kept, self.ranks = target, raw, kept, ranks
        self.writer = HuggingFaceStorageWriter(
            str(_partial(target) / SHARDS), save_distributed=True
        )
        self.copies = self.writer.stage(tensors)
        self.failure: BaseException | None = None

    def run(self) -> None:
        from torch.distributed import checkpoint

        partial = _partial(self.target)
        try:
            # over a group of its own: training talks at the same time
            checkpoint.save(
                self.copies, storage_writer=self.writer, process_group=self.ranks.beside
            )
            if self.ranks.first:
                files = sorted(f"{SHARDS}/{path.name}" for path in (partial / SHARDS).iterdir())
                finish_folder(partial, self.target, self.raw, files, self.kept)
        # for the training thread; torch's own error is no Exception
        except BaseException as failure:
            self.failure = failure
        finally:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def load_run(
    folder: Path,
    model: nn.Module,
    optimizers: Optimizers,
    ranks: Ranks,
    *,
    say: Callable[[str], None] = print,
    keeper: Keeper | None = None,
) -> TrainState:
    """`load_checkpoint` on every rank; where the model is sharded, each reads its own parts.

    Raises:
        InputError: there are checkpoints, and none is intact.
    """
    if not ranks.sharded:
        # one after another: a damaged checkpoint is set aside but once
        if not ranks.first:
            ranks.barrier()
        state = load_checkpoint(folder, model, optimizers, say=say, keeper=keeper)
        if ranks.first:
            ranks.barrier()
        return state
    finish_shards(ranks)
    groups, failure = _NONE, None
    if ranks.first:
        try:
            found = intact_checkpoint(folder, say)
            groups = _NONE if found is None else found[1].state.groups
        except InputError as error:
            groups, failure = _DAMAGED, error
    groups = ranks.told(groups)
    if failure is not None:
        raise failure
    if groups == _DAMAGED:
        raise InputError(f"{folder}: no checkpoint is intact")
    if groups == _NONE:
        return TrainState()
    path = checkpoint_path(folder, groups)
    with _together(ranks, path, reading=True):
        saved = Saved.read(path)
        kept = _read(path / SHARDS, model, optimizers)
        if keeper is not None and saved.kept is not None:
            keeper.load(saved.kept, kept)
    return saved.state


def _read(folder: Path, model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Restore both in place; returns a keeper's tensors."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    saved: dict[str, Any] = (
        HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    )
    targets = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    absent = sorted(targets.keys() - saved.keys())
    if absent:
        raise InputError(f"{folder}: {absent[0]} is missing")
    parameters = {name: parameter for parameter, name in optimizers.names.items()}
    for key, entry in saved.items():
        if key not in targets:
            targets[key] = _empty(key, entry, parameters)
    checkpoint.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)))
    optimizers.load_state_tensors(_below(_OPTIMIZER, targets))
    return {name: part(tensor).cpu() for name, tensor in _below(_KEEPER, targets).items()}


def _empty(key: str, entry: Any, parameters: dict[str, Tensor]) -> Tensor:
    """What a saved tensor is read into: in shards like its parameter, or whole."""
    name = key.removeprefix(_KEEPER)
    name = name.removeprefix(_MODEL) if name.startswith(_MODEL) else name.rpartition("/")[0]
    parameter = parameters.get(name.removeprefix(_OPTIMIZER))
    if parameter is not None and entry.size == parameter.shape:
        return torch.zeros_like(parameter, requires_grad=False)
    return torch.zeros(entry.size, dtype=entry.properties.dtype)


def _tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    state, moments = model.state_dict(), optimizers.state_tensors()
    return {
        **{_MODEL + name: tensor for name, tensor in state.items()},
        **{_OPTIMIZER + name: tensor for name, tensor in moments.items()},
    }


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


@contextmanager
def _together(ranks: Ranks, path: Path, *, reading: bool = False) -> Iterator[None]:
    """Go on only where all ranks can: an error of one is an error of all.

    Raises:
        InputError: on every rank; the one that failed says why.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failure: InputError | None = None
    try:
        yield
    except (
        InputError,
        CheckpointException,
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        SafetensorError,
    ) as error:
        failure = _told(path, error, reading)
    failed = ranks.told_by_any(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        action = "read" if reading else "write"
        raise InputError(f"{path}: another rank could not {action} its part")


def _told(path: Path, cause: BaseException, reading: bool = False) -> InputError:
    """An error as a user is told it."""
    if isinstance(cause, InputError):
        return cause
    # torch's own, of all ranks
    causes = [error for error, _ in getattr(cause, "failures", {}).values()]
    cause = causes[0] if causes else cause
    if reading:
        return InputError(f"{path}: damaged checkpoint: {str(cause).splitlines()[0]}")
    return writing_failed(path, as_os_error(cause))
