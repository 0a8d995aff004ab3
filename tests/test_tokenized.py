from __future__ import annotations

import numpy as np
import pytest

from fastbert.data import tokenized
from fastbert.data.sentences import split_sentences
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Document {n} begins. It has words, {n} of them. The end [MASK]!" for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def sentence_ids(corpus: TokenizedCorpus) -> list[list[list[int]]]:
    starts, bounds = corpus.sentence_starts, corpus.document_starts
    return [
        [
            corpus.ids[starts[sentence] : starts[sentence + 1]].tolist()
            for sentence in range(bounds[document], bounds[document + 1])
        ]
        for document in range(corpus.documents)
    ]


@pytest.mark.parametrize("batch_characters", [1, 300, 10**6])
def test_build_holds_every_sentence_in_order(
    tokenizer: Tokenizer, batch_characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenized, "_BATCH_CHARACTERS", batch_characters)
    corpus = TokenizedCorpus.build(iter(TEXTS), tokenizer)
    expected = [
        [ids.tolist() for ids in tokenizer.encode_batch(split_sentences(text), literal=True)]
        for text in TEXTS
    ]
    assert sentence_ids(corpus) == expected
    assert tokenizer.mask_id not in corpus.ids
    assert corpus.ids.dtype == np.uint16
    assert corpus.sentence_starts.dtype == corpus.document_starts.dtype == np.int64
    assert corpus.tokens == len(corpus.ids) == corpus.sentence_starts[-1]
    assert corpus.sentences == 3 * len(TEXTS) == corpus.document_starts[-1]
    assert corpus.documents == len(TEXTS)
    assert corpus.dropped_sentences == corpus.dropped_documents == 0


def test_what_gives_no_token_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    texts = ["", "The end.\n\x01\x02\nIt begins.", " \n", "\x03", "The end."]
    corpus = TokenizedCorpus.build(texts, tokenizer)
    assert (corpus.documents, corpus.sentences) == (2, 3)
    assert (corpus.dropped_documents, corpus.dropped_sentences) == (3, 2)
    assert np.all(np.diff(corpus.sentence_starts) > 0) and np.all(
        np.diff(corpus.document_starts) > 0
    )


def test_no_token_at_all(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no token in 2 documents"):
        TokenizedCorpus.build(["", "\x01"], tokenizer)
    with pytest.raises(InputError, match="no token in 0 documents"):
        TokenizedCorpus.build([], tokenizer)


def test_split_by_documents(tokenizer: Tokenizer) -> None:
    corpus = TokenizedCorpus.build(TEXTS, tokenizer)
    train, heldout = corpus.split(0.2, seed=3)
    assert (train.documents, heldout.documents) == (32, 8)
    whole = sentence_ids(corpus)
    kept, held = sentence_ids(train), sentence_ids(heldout)
    assert sorted(kept + held) == sorted(whole)
    assert kept == [document for document in whole if document not in held]
    assert held == [document for document in whole if document in held]
    assert sentence_ids(corpus.split(0.2, seed=3)[1]) == held
    assert sentence_ids(corpus.split(0.2, seed=4)[1]) != held


def test_split_of_few_long_documents_holds_their_ends_out(tokenizer: Tokenizer) -> None:
    corpus = TokenizedCorpus.build(
        [" ".join(TEXTS), "One sentence", " ".join(TEXTS[:4])], tokenizer
    )
    train, heldout = corpus.split(0.1, seed=0)
    whole, kept, held = (sentence_ids(part) for part in (corpus, train, heldout))
    assert len(kept) == 3 and len(held) == 2
    assert kept[0] + held[0] == whole[0] and len(held[0]) == 12
    assert kept[1] == whole[1]
    assert kept[2] + held[1] == whole[2] and len(held[1]) == 1


def test_split_errors(tokenizer: Tokenizer) -> None:
    corpus = TokenizedCorpus.build(["One sentence."], tokenizer)
    for fraction in (0, 1, -0.1, 2):
        with pytest.raises(InputError, match="between 0 and 1"):
            corpus.split(fraction, seed=0)
    with pytest.raises(InputError, match="too few"):
        corpus.split(0.5, seed=0)


def test_unigram_counts(tokenizer: Tokenizer) -> None:
    corpus = TokenizedCorpus.build(TEXTS, tokenizer)
    counts = corpus.unigram_counts(tokenizer.vocab_size)
    assert counts.shape == (tokenizer.vocab_size,) and counts.sum() == corpus.tokens
    begins = tokenizer.token_to_id("document")
    assert counts[begins] == len(TEXTS)
