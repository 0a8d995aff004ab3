"""A model folder computed by us and by transformers: the largest difference and the least cosine.

Both read the same files. The batch is random ids of several lengths: packed by us, padded by
transformers. Errors are against transformers in fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.bench import machine, peers
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertModel, resolve_model
from fastbert.packing import Examples
from fastbert.training.loop import autocast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS, SEED = (1, 7, 16, 33, 64, 100, 128), 0


@dataclass(frozen=True)
class Agreement:
    """Hidden states of all real tokens in one dtype.

    Attributes:
        max_difference: between fastbert and transformers.
        least_cosine: of any token's two vectors.
        ours_max_error, theirs_max_error: against fp64.
        ours_rms_error, theirs_rms_error: the same, root mean square.
    """

    dtype: str
    max_difference: float
    least_cosine: float
    ours_max_error: float
    theirs_max_error: float
    ours_rms_error: float
    theirs_rms_error: float


def compare_model(
    folder: str, dtypes: Sequence[str] = tuple(DTYPES), device: torch.device | None = None
) -> list[Agreement]:
    """Compute one batch on both sides.

    Args:
        folder: a model of any family, in Hugging Face's layout.
        dtypes: fp32, or bf16 for autocast on both sides.
        device: None for the GPU where there is one.

    Raises:
        InputError: no model there, or transformers is not installed.
    """
    package = peers.transformers()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    path = str(resolve_model(folder))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # a pooler that the files lack says nothing about the encoder
    ours = BertModel.from_pretrained(path, new_heads=True).to(device)
    theirs = package.AutoModel.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    theirs = theirs.to(device).eval()
    sequences = _sequences(ours.config.vocab_size, ours.config.pad_token_id, ours.config.max_seqlen)
    batch = Examples.from_lists(sequences).batch(range(len(sequences))).to(device)
    padded, mask = _padded(sequences, ours.config.pad_token_id, device)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for dtype in dtypes:
            with autocast(device, DTYPES[dtype]):
                own = ours(batch).last_hidden_state
                other = theirs(padded, attention_mask=mask).last_hidden_state[mask != 0]
            found[dtype] = (own.double(), other.double())
        oracle = theirs.double()(padded, attention_mask=mask).last_hidden_state[mask != 0]
    return [_agreement(dtype, *sides, oracle) for dtype, sides in found.items()]


def _agreement(dtype: str, own: Tensor, other: Tensor, oracle: Tensor) -> Agreement:
    cosine = torch.nn.functional.cosine_similarity(own, other, dim=-1)
    ours_error, theirs_error = (own - oracle).abs(), (other - oracle).abs()
    return Agreement(
        dtype,
        float((own - other).abs().max()),
        float(cosine.min()),
        float(ours_error.max()),
        float(theirs_error.max()),
        math.sqrt(float(ours_error.square().mean())),
        math.sqrt(float(theirs_error.square().mean())),
    )


def _sequences(vocab_size: int, pad_token_id: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(SEED)
    sequences = []
    for length in LENGTHS:
        ids = rng.integers(0, vocab_size, min(length, longest))
        # padding in the middle is nothing that a tokenizer writes
        ids[ids == pad_token_id] = (pad_token_id + 1) % vocab_size
        sequences.append(ids.tolist())
    return sequences


def _padded(sequences: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    rows = [ids + [pad] * (longest - len(ids)) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return torch.tensor(rows, device=device), mask.to(device)


def table(rows: Sequence[Agreement]) -> str:
    """The comparison as lines for a terminal."""
    head = ["dtype", "max difference", "least cosine", "max error, ours", "transformers'"]
    head += ["rms error, ours", "transformers'"]
    body: list[list[Any]] = [
        [
            row.dtype,
            f"{row.max_difference:.2e}",
            f"{row.least_cosine:.9f}",
            f"{row.ours_max_error:.2e}",
            f"{row.theirs_max_error:.2e}",
            f"{row.ours_rms_error:.2e}",
            f"{row.theirs_rms_error:.2e}",
        ]
        for row in rows
    ]
    return "\n".join("".join(f"{cell:>17}" for cell in line) for line in [head, *body])


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="fastbert parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a model folder of any family, or a run of fastbert")
    parser.add_argument("--dtype", choices=["all", *DTYPES], default="all", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    given = parser.parse_args(arguments)
    if given.json is not None and not given.json.parent.is_dir():
        raise InputError(f"--json {given.json}: no such folder {given.json.parent}")
    dtypes = tuple(DTYPES) if given.dtype == "all" else (given.dtype,)
    rows = compare_model(given.model, dtypes)
    package = peers.transformers()
    print(f"{given.model}: hidden states beside transformers {package.__version__},")
    print(f"{sum(LENGTHS)} tokens at most in {len(LENGTHS)} sequences; errors against fp64")
    print(table(rows))
    if not all(math.isfinite(row.max_difference) for row in rows):
        raise InputError(f"{given.model}: hidden states are not finite")
    if given.json is not None:
        _write(given.json, given.model, rows)
    return 0


def _write(path: Path, model: str, rows: Sequence[Agreement]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "bench": "parity",
        "machine": machine.describe(device),
        "model": Path(model).resolve().parent.name if Path(model).is_dir() else model,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    with atomic_write(path) as file:
        json.dump(found, file, indent=2)
        file.write("\n")
