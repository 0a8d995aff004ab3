"""A corpus as token ids in memory: sentences inside documents, flat numpy arrays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from fastbert.data.sentences import split_sentences
from fastbert.errors import InputError
from fastbert.tokenizer import Tokenizer

_BATCH_CHARACTERS = 4_000_000
_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class TokenizedCorpus:
    """Token ids without [CLS] and [SEP]; no sentence and no document is empty."""

    ids: np.ndarray  # [tokens] uint16, or uint32 where the vocabulary has 65,536 tokens or more
    sentence_starts: np.ndarray  # [sentences + 1] int64, into ids
    document_starts: np.ndarray  # [documents + 1] int64, into sentences
    dropped_sentences: int = 0  # those that gave no token
    dropped_documents: int = 0  # those that gave no sentence

    @classmethod
    def build(
        cls, documents: Iterable[str], tokenizer: Tokenizer, *, progress: bool = False
    ) -> TokenizedCorpus:
        """Cut documents into sentences and these into ids; some 4 MB of text at a time.

        Special tokens spelt out in the text ("[MASK]") are read as ordinary text.

        Raises:
            InputError: no document gave a token.
        """
        dtype = np.uint16 if tokenizer.vocab_size < 2**16 else np.uint32
        ids, lengths, sizes = [], [], []
        documents = tqdm(documents, desc="tokenizing", unit=" documents", disable=not progress)
        for texts, counts in _batches(documents):
            encoded = tokenizer.encode_batch(texts, literal=True)
            if encoded:
                ids.append(np.concatenate(encoded).astype(dtype))
            lengths.append(np.array([len(sentence) for sentence in encoded], dtype=np.int64))
            owners = np.repeat(np.arange(len(counts)), counts)
            sizes.append(np.bincount(owners[lengths[-1] > 0], minlength=len(counts)))
        return cls._assemble(
            np.concatenate([np.empty(0, dtype), *ids]),
            np.concatenate([np.empty(0, np.int64), *lengths]),
            np.concatenate([np.empty(0, np.int64), *sizes]),
        )

    @classmethod
    def _assemble(cls, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> TokenizedCorpus:
        if not len(ids):
            raise InputError(f"tokenizing: no token in {len(sizes)} documents")
        return cls(
            ids=ids,
            sentence_starts=_starts(lengths[lengths > 0]),
            document_starts=_starts(sizes[sizes > 0]),
            dropped_sentences=int((lengths == 0).sum()),
            dropped_documents=int((sizes == 0).sum()),
        )

    @property
    def tokens(self) -> int:
        """Number of token ids."""
        return len(self.ids)

    @property
    def sentences(self) -> int:
        """Number of sentences."""
        return len(self.sentence_starts) - 1

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    def unigram_counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, `[vocab_size]` int64."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        # in blocks: bincount widens what it counts, and shards are larger than memory
        for start in range(0, self.tokens, _COUNTED_AT_ONCE):
            block = np.asarray(self.ids[start : start + _COUNTED_AT_ONCE])
            counts += np.bincount(block, minlength=vocab_size)
        return counts

    def split(self, fraction: float, seed: int) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        """Two corpora, the second with about `fraction` of the documents; the order is kept.

        With fewer than `1 / fraction` documents, books for instance, the end of each document is
        held out instead: sentences that follow one another, about `fraction` of them.

        Raises:
            InputError: `fraction` is not between 0 and 1, or there are too few sentences.
        """
        if not 0 < fraction < 1:
            raise InputError(f"held-out fraction: between 0 and 1 is wanted, got {fraction}")
        if self.documents * fraction < 1:
            return self._split_documents(fraction)
        count = min(round(self.documents * fraction), self.documents - 1)
        chosen = random.Random(seed).sample(range(self.documents), count)
        held = np.zeros(self.documents, dtype=np.bool_)
        held[chosen] = True
        sentence_held = np.repeat(held, np.diff(self.document_starts))
        return self._select(~sentence_held), self._select(sentence_held)

    def _split_documents(self, fraction: float) -> tuple[TokenizedCorpus, TokenizedCorpus]:
        held = np.zeros(self.sentences, dtype=np.bool_)
        for start, end in itertools.pairwise(self.document_starts.tolist()):
            count = min(max(round((end - start) * fraction), 1), end - start - 1)
            held[end - count : end] = True
        if not held.any():
            raise InputError(
                f"held-out fraction {fraction}: {self.documents} documents of one sentence are too "
                "few to hold any out"
            )
        return self._select(~held), self._select(held)

    def _select(self, wanted: np.ndarray) -> TokenizedCorpus:
        """The sentences where `wanted` ([sentences] bool) is True, in their documents."""
        lengths = np.diff(self.sentence_starts)
        owners = np.repeat(np.arange(self.documents), np.diff(self.document_starts))
        return self._assemble(
            self.ids[np.repeat(wanted, lengths)],
            lengths[wanted],
            # a document with nothing wanted is no dropped one
            np.unique(owners[wanted], return_counts=True)[1],
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _batches(documents: Iterable[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Sentences of whole documents, and how many each document has."""
    texts: list[str] = []
    counts: list[int] = []
    characters = 0
    for document in documents:
        sentences = split_sentences(document)
        texts += sentences
        counts.append(len(sentences))
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield texts, counts
            texts, counts, characters = [], [], 0
    if counts:
        yield texts, counts
