"""What tasks on texts and pairs of texts share: flags, units, inputs, the head they sit on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastbert.checkpoint import NameMap, stored_shapes
from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertForSequenceClassification
from fastbert.tasks.records import FileFormat, text_field
from fastbert.tasks.saved import load_with_head
from fastbert.tasks.sequences import join, join_cut, room, say_share, windows
from fastbert.tasks.table import Row
from fastbert.tasks.task import Say, Task, option
from fastbert.tasks.units import Units
from fastbert.tokenizer import Tokenizer

# names of a text and of its second one in what a caller asks
_FIRST = ("text", "sentence", "sentence1", "text_a", "premise", "question", "query")
_SECOND = ("second", "text_pair", "sentence2", "text_b", "hypothesis", "passage")


@dataclass
class PairTask(Task):
    """A task over rows of one text or two, with one vector of numbers each."""

    text_column: str | None = option("guessed from the names")
    pair_column: str | None = option("second text of a pair; guessed from the names")
    columns: str | None = option("names of a file without a header line, with commas between")
    quoting: str = option("of a .tsv: csv, none, or auto for a guess", "auto")
    pair: bool = field(default=False, init=False)

    @property
    def form(self) -> FileFormat:
        names = None if self.columns is None else tuple(n.strip() for n in self.columns.split(","))
        return FileFormat(self.encoding, names, self.quoting)

    def show(self, row: Row) -> str:
        shown = {"text": row.text, "second": row.second, "label": row.label}
        return json.dumps({k: v for k, v in shown.items() if v is not None}, ensure_ascii=False)

    def rows_of_texts(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Row]:
        """Rows of texts, of two texts each, or of dictionaries.

        Raises:
            InputError: one text where two are needed, or the other way round.
        """
        rows = []
        for given, place in zip(inputs, places, strict=True):
            first, second = self._texts_of(given, place)
            if (second is not None) != self.pair:
                needed = "two texts" if self.pair else "one text"
                raise InputError(f"{place}: this model was trained on {needed} a row")
            rows.append(Row(first, second=second))
        return rows

    def _texts_of(self, given: Any, where: str) -> tuple[str, str | None]:
        """A row like those of the training file has its texts where they were there."""
        first, second = self.text_column, self.pair_column if self.pair else None
        there = isinstance(given, dict) and first in given
        if first is None or not there or (self.pair and second not in given):
            return _texts(given, where)
        return (
            text_field(where, given, first),
            None if second is None else text_field(where, given, second),
        )

    def from_line(self, text: str, where: str) -> Any:
        return split_pair(text, where) if self.pair else text

    def load_classifier(
        self, folder: Path, dropout: float | None, seed: int
    ) -> tuple[BertForSequenceClassification, list[str]]:
        """As `load`, with a head over the pooled first token."""
        return load_with_head(
            BertForSequenceClassification, folder, self, dropout=dropout, seed=seed
        )

    def save_classifier(self, model: nn.Module, folder: Path, problem_type: str) -> None:
        """As `save_model`, with what transformers needs to know of the loss."""
        model.save_pretrained(folder)  # type: ignore[operator]
        path = folder / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8")) | {"problem_type": problem_type}
        with atomic_write(path) as file:
            json.dump(raw, file, indent=2, sort_keys=True)
            file.write("\n")

    def unnamed_labels(self, folder: Path) -> list[str]:
        """Transformers leaves names out of config.json where nobody gave any."""
        config = EncoderConfig.from_pretrained(folder)
        names = NameMap.of(config, BertForSequenceClassification.name)
        stored = names.theirs("classifier.dense.weight", prefixed=False)[0]
        shapes = names.canonical(stored_shapes(folder))
        if stored not in shapes:
            raise InputError(
                f"{folder}: not a classifier: config.json names no labels; "
                "`fastbert finetune classify` makes one"
            )
        return [f"LABEL_{number}" for number in range(shapes[stored][0])]


def split_pair(text: str, where: str, what: str = "this model was trained on pairs") -> list[str]:
    """Two texts with one tab between them.

    Raises:
        InputError: none, or more of them.
    """
    first, tab, second = text.partition("\t")
    if not tab or "\t" in second:
        tabs = counted(text.count("\t"), "tab")
        raise InputError(
            f"{where}: {what}: a line must be two texts with one tab between them, found {tabs}"
        )
    return [first, second]


def _texts(given: Any, where: str) -> tuple[str, str | None]:
    if isinstance(given, str):
        return given, None
    if isinstance(given, dict):
        first = next((name for name in _FIRST if name in given), None)
        if first is None:
            raise InputError(f"{where}: no field 'text'; there are {', '.join(map(repr, given))}")
        second = next((name for name in _SECOND if given.get(name) is not None), None)
        return (
            text_field(where, given, first),
            None if second is None else text_field(where, given, second),
        )
    if isinstance(given, list | tuple) and len(given) == 2:
        return str(given[0]), str(given[1])
    raise InputError(f"{where}: a text, two texts or a dictionary is wanted, got {given!r:.60}")


def pair_units(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    windowed: bool = False,
    stride: int = 0,
    name: str = "",
    say: Say | None = None,
) -> Units:
    """One unit a row: its sequence, or its windows.

    Args:
        rows: texts; pairs where `second` is not None.
        tokenizer: the model's.
        max_seq_len: tokens a sequence.
        windowed: cover long texts by windows (of a pair, over its first text; the second takes at
            most half), instead of cutting their end (of a pair, of the longer one).
        stride: tokens that neighbouring windows share.
        name: of the rows, for what is said.
        say: told how many texts were cut or windowed, if any.
    """
    first = tokenizer.encode_batch([row.text for row in rows])
    paired = [number for number, row in enumerate(rows) if row.second is not None]
    encoded = tokenizer.encode_batch([rows[number].second or "" for number in paired])
    second = dict(zip(paired, encoded, strict=True))
    sequences, counts, long = [], [], 0
    for number, one in enumerate(first):
        two = second.get(number)
        space = room(tokenizer, two is not None, max_seq_len)
        too_long = len(one) + (0 if two is None else len(two)) > space
        long += too_long
        if not (windowed and too_long):
            sequences.append(join_cut(tokenizer, one, two, max_seq_len)[0])
            counts.append(1)
            continue
        kept = None if two is None else two[: max(space // 2, space - len(one))]
        size = space - (0 if kept is None else len(kept))
        stretches = windows(len(one), size, min(stride, size - 1))
        sequences += [join(tokenizer, one[start:end], kept) for start, end in stretches]
        counts.append(len(stretches))
    what = "windowed" if windowed else f"cut to {max_seq_len} tokens"
    say_share(say, name, long, len(rows), "text", what)
    return Units(
        [joined.input_ids for joined in sequences],
        [joined.token_type_ids for joined in sequences],
        cu_units=np.cumsum([0, *counts]),
    )
