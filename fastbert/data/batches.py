"""Samples to a batch: gather tokens, mask, lay out. A function of the samples alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastbert.data.draws import Draws
from fastbert.data.masking import choose_tokens, choose_units, hide, word_units
from fastbert.data.samples import Samples
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer

# the blocks that BERT's tokenizer takes for Chinese (google-research/bert, tokenization.py)
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True)
class Vocabulary:
    """What writing and masking must know of a tokenizer; small, and sent to worker processes."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]
    is_subword: np.ndarray
    is_ideograph: np.ndarray

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
            np.array([_is_ideograph(token) for token in tokenizer.tokens]),
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
    masking: str,
    mask_probability: float,
    draws: Draws,
    most_masked: int | None = None,
    edges: np.ndarray | None = None,
) -> Examples:
    """Write out samples and mask them.

    Args:
        ids: [tokens] of each part.
        samples: which tokens.
        vocabulary: the special ids.
        masking: what is predicted as one, a name in `masking.STYLES`.
        mask_probability: share of the ordinary tokens to predict.
        draws: of this seed and epoch.
        most_masked: targets a batch has room for; what chance brings beyond is left out.
        edges: [batches + 1] int64, where batches begin among the samples; None for one of all.
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
    where = (samples.index, starts, ordinary)
    together = None
    if masking == "token":
        chosen = choose_tokens(*where, mask_probability, draws)
    else:
        units = word_units(
            masking, input_ids, *where, vocabulary.is_subword, vocabulary.is_ideograph, draws
        )
        chosen = choose_units(*where, units, mask_probability, draws)
    if most_masked is not None:
        bounds = starts[[0, len(samples)] if edges is None else edges]
        chosen = _at_most(chosen, bounds, most_masked)
    owner = np.searchsorted(starts, chosen, "right") - 1
    if masking == "span":
        together = _unit_starts(ordinary, units)[chosen] - starts[owner]
    labels = hide(
        input_ids,
        chosen,
        samples.index[owner],
        chosen - starts[owner],
        vocabulary.words,
        vocabulary.mask_id,
        draws,
        together,
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


def _at_most(chosen: np.ndarray, bounds: np.ndarray, most: int) -> np.ndarray:
    """The first `most` of each batch's places, which are ascending."""
    first = np.searchsorted(chosen, bounds)
    rank = np.arange(len(chosen)) - np.repeat(first[:-1], np.diff(first))
    return chosen[rank < most]


def _unit_starts(ordinary: np.ndarray, units: np.ndarray) -> np.ndarray:
    """[tokens] int64, at ordinary tokens where their unit begins."""
    candidates = np.flatnonzero(ordinary)
    starts = np.zeros(len(ordinary), dtype=np.int64)
    starts[candidates] = candidates[np.flatnonzero(np.diff(units, prepend=-1))][units]
    return starts


def _is_ideograph(token: str) -> bool:
    """Whether BERT's tokenizer sets this apart as a Chinese character."""
    return len(token) == 1 and any(low <= ord(token) <= high for low, high in _IDEOGRAPHS)


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
