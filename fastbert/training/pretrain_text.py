"""What a pre-training run learns from and is scored on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbert.data.cache import shards_of
from fastbert.data.draws import Draws
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part, hold_out
from fastbert.data.shards import Manifest, open_folder
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.packing import PackedBatch
from fastbert.tokenizer import Tokenizer
from fastbert.training.evaluation import heldout_pass
from fastbert.training.pretrain_config import PretrainConfig
from fastbert.training.state import TrainState

# held-out text past this many tokens makes the scores no better, only later
MOST_HELDOUT_TOKENS = 150_000
HOLD_OUT = 300


@dataclass(frozen=True)
class Text:
    """What a run trains and is scored on.

    Attributes:
        tokenizer: of all of it.
        scored: held-out batches, by what their figures' names begin with: "" for the text's own.
        log_probabilities: [vocab_size] float64, the unigram's.
        batches: endless, from a state on, each with the position after it; to be closed.
        checksum: of text and vocabulary, where they are on disk.
    """

    tokenizer: Tokenizer
    scored: dict[str, list[PackedBatch]]
    log_probabilities: np.ndarray
    batches: Callable[[TrainState], Any]
    checksum: str = ""


@dataclass(frozen=True)
class Source:
    """One text of a run.

    Attributes:
        parts: to train on.
        heldout: to score on.
        checksum: of text and vocabulary.
    """

    parts: list[Part]
    heldout: TokenizedCorpus
    checksum: str

    @classmethod
    def open(
        cls,
        sources: list[str],
        tokenizer: Tokenizer,
        config: PretrainConfig,
        doc_sep: str,
        say: Callable[[str], None],
    ) -> Source:
        """Map shards, or prepare text into some, and hold a part out."""
        shards = shards_of(sources, tokenizer, doc_sep=doc_sep, say=say)
        manifest, corpora = open_folder(shards, tokenizer.fingerprint, say=say)
        parts, heldout_corpus = _split(config, manifest, corpora)
        say(
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens; "
            f"{heldout_corpus.tokens:,} of them held out"
        )
        return cls(parts, heldout_corpus, manifest.checksum)

    def scored(self, tokenizer: Tokenizer, config: PretrainConfig) -> list[PackedBatch]:
        """The held-out text as batches, the same in every run."""
        objective = Objective.parse(config.objective)
        return heldout_pass(self.heldout, tokenizer, objective, config.max_seq_len)


def _split(
    config: PretrainConfig, manifest: Manifest, corpora: list[TokenizedCorpus]
) -> tuple[list[Part], TokenizedCorpus]:
    """What is trained on, and what is held out."""
    fraction = min(config.heldout, MOST_HELDOUT_TOKENS / manifest.tokens)
    if manifest.documents >= 4 and manifest.documents * fraction >= 1.0:
        # a random next sentence comes from another document
        fraction = max(fraction, 2 / manifest.documents)
    parts, heldout_corpus = hold_out(corpora, fraction, Draws(config.seed, HOLD_OUT))
    fewest = min(heldout_corpus.documents, *(len(part.starts) for part in parts))
    if Objective.parse(config.objective).pair == "nsp" and fewest < 2:
        raise InputError(
            f"--objective {config.objective} needs at least 2 documents to train on in every "
            f"shard and 2 held out, found {manifest.documents} in all; --doc-sep splits the text "
            "otherwise, or take mlm+sop"
        )
    return parts, heldout_corpus
