"""Texts that lie in columns: .parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbert.data.text_files import is_hub_name
from fastbert.errors import InputError

_COLUMN = "text"
_ROWS_AT_ONCE = 1024


def is_table(path: Path) -> bool:
    """Whether `table_texts` reads this."""
    return is_hub_name(path) or path.suffix.lower() == ".parquet"


def table_texts(path: Path) -> Iterator[tuple[str, int]]:
    """Stream the `text` column: each text with its row, counted from 1.

    Args:
        path: a .parquet file, or hf:NAME or hf:NAME:CONFIGURATION, whose train split is streamed.

    Raises:
        InputError: no such column, unreadable, or the library that reads it is not installed.
    """
    rows = _hub_rows(path) if is_hub_name(path) else _parquet_rows(path)
    for number, text in enumerate(rows, 1):
        if not isinstance(text, str):
            kind = "nothing" if text is None else type(text).__name__
            raise InputError(f"{path}:{number}: `{_COLUMN}` must be a string, found {kind}")
        yield text, number


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: .parquet needs pyarrow: pip install 'fastbert[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if _COLUMN not in names:
                raise InputError(f"{path}: no column `{_COLUMN}`; its columns are: {names}")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[_COLUMN]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot read: {str(error).splitlines()[0]}") from error


def _hub_rows(path: Path) -> Iterator[Any]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: hf: needs datasets: pip install 'fastbert[data]'") from None
    name, _, configuration = str(path).removeprefix("hf:").partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        for row in found:
            if _COLUMN not in row:
                raise InputError(f"{path}: no column `{_COLUMN}`; its columns are: {list(row)}")
            yield row[_COLUMN]
    except InputError:
        raise
    # what the hub's libraries raise has no common root
    except Exception as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot read the data set: {line}") from error
