"""`fastbert embed`: vectors of texts in a memory-mapped .npy, with the texts' ids beside them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastbert.data.text_files import counted, decoded_lines
from fastbert.errors import InputError
from fastbert.files import writing_failed
from fastbert.tasks.embed import Embed
from fastbert.tasks.inference import TOKEN_BUDGET
from fastbert.tasks.records import json_object, text_field
from fastbert.tasks.saved import Saved, refuse_non_finite

TEXTS_AT_ONCE = 4096


def embed_files(
    model: str | os.PathLike[str],
    files: Sequence[str],
    out: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    token_budget: int = TOKEN_BUDGET,
    say: Callable[[str], None] = print,
) -> None:
    """Write `out` ([texts, hidden_size] float32) and `out` with .ids.txt for .npy (an id a line).

    Args:
        model: a run of `finetune embed`, or a folder that sentence-transformers reads.
        files: one text a line, or .jsonl with text and perhaps id; ids are "file:line" where
            nobody gives one. Blank lines are skipped and counted.
        out: a new .npy file.
        device, dtype, token_budget: of the computation.
        say: told what was written.

    Raises:
        InputError: no such model, no text, or a file that is there already.
    """
    out = Path(out)
    ids_file = out.with_suffix(".ids.txt")
    if out.suffix != ".npy" or out.exists() or ids_file.exists() or not out.parent.is_dir():
        raise InputError(f"--out {out}: name a new .npy file in a folder that exists")
    saved = Saved.from_pretrained(model, device)
    if not isinstance(saved.task, Embed):
        raise InputError(
            f"{model}: was trained for {saved.task.name}; embed wants vectors of texts"
        )
    # the size of the file must be known before it is mapped
    blank: list[str] = []
    texts = sum(1 for _ in _texts(files, blank))
    if not texts:
        raise InputError(f"{', '.join(files)}: no text")
    width = int(saved.models[0].config.hidden_size)  # type: ignore[union-attr,arg-type]
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        vectors = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.float32, shape=(texts, width)
        )
        _fill(vectors, saved, _texts(files, []), ids_file, dtype, token_budget, say)
        vectors.flush()
        os.replace(partial, out)
    except OSError as error:
        raise writing_failed(out, error) from error
    finally:
        partial.unlink(missing_ok=True)
    skipped = f"; {counted(len(blank), 'blank line')} skipped" if blank else ""
    say(f"{out}: {texts:,} x {width} float32, ids in {ids_file}{skipped}")


def _fill(
    vectors: np.ndarray,
    saved: Saved,
    texts: Iterator[tuple[str, str]],
    ids_file: Path,
    dtype: torch.dtype,
    token_budget: int,
    say: Callable[[str], None],
) -> None:
    done = 0
    with (
        open(ids_file, "w", encoding="utf-8") as ids,
        tqdm(total=len(vectors), unit=" texts", disable=not sys.stderr.isatty()) as bar,
    ):
        while some := list(islice(texts, TEXTS_AT_ONCE)):
            names, wanted = zip(*some, strict=True)
            units = saved.build(saved.task.rows_of(wanted, names), say=say)
            raw = saved.run(units, dtype=dtype, token_budget=token_budget, progress=bar.update)
            refuse_non_finite(raw, "embed")
            assert raw.sequences is not None
            vectors[done : done + len(some)] = raw.sequences
            ids.writelines(f"{name}\n" for name in names)
            done += len(some)


def _texts(files: Sequence[str], blank: list[str]) -> Iterator[tuple[str, str]]:
    for name in files:
        if not Path(name).is_file():
            raise InputError(f"{name}: no such file")
        jsonl = name.lower().endswith((".jsonl", ".jsonl.gz"))
        for text, number in decoded_lines(Path(name)):
            where = f"{name}:{number}"
            if not text.strip():
                blank.append(where)
                continue
            own = where
            if jsonl:
                fields = json_object(text, where)
                text = text_field(where, fields, "text")
                given = next((fields[n] for n in ("id", "_id") if n in fields), own)
                own = given if isinstance(given, str) else json.dumps(given)
            yield own.replace("\n", " "), text
