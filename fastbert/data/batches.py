"""Samples to a batch: gather tokens, mask, lay out. A function of the samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastbert.data.draws import Draws
from fastbert.data.masking import choose_tokens, hide
from fastbert.data.samples import Samples
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What writing and masking must know of a tokenizer; small, and sent to worker processes."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    is_subword: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        return cls(
            tokenizer.vocab_size,
            tokenizer.cls_id,
            tokenizer.sep_id,
            tokenizer.mask_id,
            tuple(tokenizer.special_ids),
            tokenizer.is_subword,
        )

    @cached_property
    def is_special(self) -> np.ndarray:
        """[size] bool."""
        special = np.zeros(self.size, dtype=bool)
        special[list(self.special_ids)] = True
        return special

    @cached_property
    def words(self) -> np.ndarray:
        """[words] int64, the ids that are not special."""
        return np.flatnonzero(~self.is_special)


def write_samples(
    ids: Sequence[np.ndarray],
    samples: Samples,
    vocabulary: Vocabulary,
    mask_probability: float,
    draws: Draws,
) -> Examples:
    """Write out samples and mask them.

    Args:
        ids: [tokens] of each part.
        samples: which tokens.
        vocabulary: the special ids.
        mask_probability: share of the ordinary tokens to predict.
        draws: of this seed and epoch.
    """
    sizes = samples.ranges[:, :, 1] - samples.ranges[:, :, 0]
    lengths = samples.lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    input_ids = np.full(starts[-1], vocabulary.sep_id, dtype=np.int64)
    token_type_ids = np.zeros(starts[-1], dtype=np.int64)
    ordinary = np.zeros(starts[-1], dtype=bool)
    input_ids[starts[:-1]] = vocabulary.cls_id
    at = starts[:-1] + 1
    for segment in range(sizes.shape[1]):
        size = sizes[:, segment]
        if not size.any():
            continue
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        target = np.repeat(at, size) + within
        source = np.repeat(samples.ranges[:, segment, 0], size) + within
        input_ids[target] = _gathered(ids, samples.part, size, source)
        ordinary[target] = True
        if segment % 2:
            token_type_ids[target] = 1
            token_type_ids[(at + size)[size > 0]] = 1
        at = at + size + (size > 0)
    ordinary &= ~vocabulary.is_special[input_ids]
    chosen = choose_tokens(samples.index, starts, ordinary, mask_probability, draws)
    owner = np.searchsorted(starts, chosen, "right") - 1
    labels = hide(
        input_ids,
        chosen,
        samples.index[owner],
        chosen - starts[owner],
        vocabulary.words,
        vocabulary.mask_id,
        draws,
    )
    paired = sizes.shape[1] > 1
    return Examples(
        input_ids=input_ids,
        token_type_ids=token_type_ids,
        cu_seqlens=starts,
        masked_positions=chosen,
        labels=labels,
        sequence_labels=samples.labels if paired else None,
        # dropout's coordinates are 32 bits wide; equal ones in a step would only share a mask
        sample_ids=samples.index & 0x7FFFFFFF,
    )


def _gathered(
    ids: Sequence[np.ndarray], part: np.ndarray, size: np.ndarray, source: np.ndarray
) -> np.ndarray:
    if len(ids) == 1:
        return ids[0][source]
    found = np.empty(len(source), dtype=np.int64)
    of_token = np.repeat(part, size)
    for number in np.unique(part).tolist():
        own = of_token == number
        found[own] = ids[number][source[own]]
    return found
