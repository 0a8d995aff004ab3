"""How long sequences are: named distributions, one length, or the lines of a text file.

Log-normals are fitted to tokens of bert-base-uncased's vocabulary, [CLS] and [SEP] included: `wiki`
to paragraphs of English Wikipedia, `tweets` to the messages of WNUT 2017, `queries` to the
questions of TREC-6; `sentences` is the mixture that this bench has used from its first day.
"""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass

import numpy as np

from fastbert.errors import InputError


@dataclass(frozen=True)
class Distribution:
    """Lengths in tokens, special tokens included.

    Attributes:
        mean: of the log-normal, before the cap; 0 for evenly spread between the ends.
        sigma: of its logarithm.
        shortest, longest: lengths beyond are cut to these.
    """

    mean: float
    sigma: float
    shortest: int
    longest: int

    def lengths(self, sequences: int, seed: int = 0) -> np.ndarray:
        """[sequences] int64: evenly spaced quantiles, so that no lucky draw decides; shuffled."""
        levels = (np.arange(sequences) + 0.5) / sequences
        if self.mean:
            mu = math.log(self.mean) - self.sigma**2 / 2
            normal = statistics.NormalDist(mu, self.sigma)
            drawn = np.exp([normal.inv_cdf(level) for level in levels])
        else:
            drawn = self.shortest + levels * (self.longest - self.shortest)
        lengths = np.clip(np.rint(drawn), self.shortest, self.longest).astype(np.int64)
        return np.random.default_rng(seed).permutation(lengths)


NAMED = {
    "sentences": Distribution(41.0, 0.7, 5, 128),
    "uniform": Distribution(0.0, 0.0, 5, 128),
    "wiki": Distribution(110.0, 0.68, 5, 512),
    # windows of whole articles, cut at 512
    "articles": Distribution(230.0, 0.8, 16, 512),
    "tweets": Distribution(31.0, 0.46, 5, 80),
    "queries": Distribution(13.5, 0.32, 5, 41),
}


def lengths_of(name: str, sequences: int, seed: int = 0) -> np.ndarray:
    """[sequences] int64 lengths in tokens.

    Args:
        name: a name of `NAMED`, a number for one length, or a text file, a sequence a line.
        sequences: wanted.
        seed: of their order.

    Raises:
        InputError: none of these, or the file holds fewer lines.
    """
    if name in NAMED:
        return NAMED[name].lengths(sequences, seed)
    if name.isdigit() and int(name) > 2:
        return np.full(sequences, int(name), dtype=np.int64)
    if os.path.isfile(name):
        return _of_file(name, sequences)
    raise InputError(
        f"--lengths {name}: no such file; accepted are {', '.join(NAMED)}, a number above 2, "
        "or a text file"
    )


def padding_share(lengths: np.ndarray, batch_size: int, *, ordered: bool = False) -> float:
    """The share of padding where batches are padded to their longest sequence.

    Args:
        lengths: in the order of the batches.
        batch_size: sequences a batch.
        ordered: sorted by length first, the best order for padded batches.
    """
    lengths = np.sort(lengths) if ordered else lengths
    padded = sum(
        len(part) * int(part.max())
        for part in (lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size))
    )
    return 1.0 - float(lengths.sum()) / padded


def _of_file(path: str, sequences: int) -> np.ndarray:
    from fastbert.bench.public_model import default_model
    from fastbert.tokenizer import Tokenizer

    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise InputError(f"--lengths {path}: not UTF-8 at byte {error.start}") from None
    lines = [line for line in lines if line][:sequences]
    if len(lines) < sequences:
        raise InputError(f"--lengths {path}: {len(lines)} lines with text, {sequences} are wanted")
    encoded = Tokenizer.from_pretrained(default_model()).encode_batch(lines, literal=True)
    return np.asarray([min(len(ids) + 2, 512) for ids in encoded], dtype=np.int64)
