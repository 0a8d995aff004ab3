"""Pairs as each family's own tokenizer in transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import WORDS

from fastbert.tasks.sequences import join, room
from fastbert.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is in the test extra")

FIRST = ["the river", "Stone bridge, winter!", "a", "naïve café 3.50", ""]
SECOND = ["lantern in the garden?", "b", "captain's letter", "深度 学习", "silver"]
CORPUS = [" ".join(WORDS)] * 5 + FIRST + SECOND


def trained(kind: str, special: list[str], folder: Path) -> dict[str, Any]:
    """The model of a tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer

    if kind == "BPE":
        backend = ByteLevelBPETokenizer()
        backend.train_from_iterator(
            CORPUS, vocab_size=400, special_tokens=special, show_progress=False
        )
    else:
        backend = SentencePieceUnigramTokenizer()
        backend.train_from_iterator(
            CORPUS, 120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    backend.save(str(folder / "trained.json"))
    return json.loads((folder / "trained.json").read_text())["model"]


def of_family(family: str, tmp_path: Path) -> Any:
    """transformers' own class with a vocabulary of its kind."""
    fairseq = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if family == "bert":
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *WORDS,
            *"abcdefghijklmnopqrstuvwxyz",
        ]
        return transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    kind = "Unigram" if family in ("xlm-roberta", "albert") else "BPE"
    special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"] if family == "albert" else fairseq
    model = trained(kind, special, tmp_path)
    if kind == "BPE":
        merges = [tuple(merge) for merge in model["merges"]]
        return transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges)
    pieces = [(piece, score) for piece, score in model["vocab"]]
    name = "AlbertTokenizer" if family == "albert" else "XLMRobertaTokenizer"
    return getattr(transformers, name)(vocab=pieces)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "albert"])
def test_pairs_are_joined_as_transformers_joins_them(family, tmp_path):
    theirs = of_family(family, tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    ours = Tokenizer.from_pretrained(tmp_path / "saved")
    for first, second in zip(FIRST, SECOND, strict=True):
        expected = theirs(first, second, return_token_type_ids=True)
        parts = [np.array(ours.encode(text), dtype=np.int64) for text in (first, second)]
        joined = join(ours, *parts)
        assert joined.input_ids.tolist() == expected["input_ids"]
        assert joined.token_type_ids.tolist() == expected["token_type_ids"]
        assert joined.input_ids[joined.second :][: len(parts[1])].tolist() == parts[1].tolist()
        assert join(ours, parts[0]).input_ids.tolist() == theirs(first)["input_ids"]
    separators = expected["input_ids"].count(theirs.sep_token_id) - 1
    if family != "xlm-roberta":
        # of which transformers 5.0 joins pairs by one, later releases by two
        assert separators == (2 if family == "roberta" else 1)
    ids = join(ours, *parts).input_ids.tolist()
    assert ids.count(ours.sep_id) == separators + 1 and ids[0] == ours.cls_id
    assert room(ours, True, 64) == 64 - separators - 2
