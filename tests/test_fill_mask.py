from __future__ import annotations

import pytest
import torch
from tiny import stirred, tiny_config, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM
from fastbert.tasks.fill_mask import fill_mask

VOCABULARY = tiny_tokenizer().vocab_size
WORDS = VOCABULARY - 5


def model_of(vocab_size: int) -> BertForMaskedLM:
    return stirred(BertForMaskedLM.from_config(tiny_config(vocab_size=vocab_size)))


def test_each_blank_has_its_own_words_in_order() -> None:
    tokenizer, model = tiny_tokenizer(), model_of(VOCABULARY)
    texts = ["the [MASK] stone", "[MASK] river, [MASK] bridge"]
    blanks = fill_mask(model, tokenizer, texts, top=WORDS)
    assert [len(of_text) for of_text in blanks] == [1, 2]
    for text, of_text in zip(texts, blanks, strict=True):
        ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]])
        with torch.no_grad():
            logits = model(ids).logits[ids == tokenizer.mask_id]
        for blank, row in zip(of_text, logits, strict=True):
            # sorted by likelihood, each word once, no special token
            order = [i for i in row.argsort(descending=True).tolist() if i >= 5]
            assert tokenizer.special_ids == (0, 1, 2, 3, 4)
            assert [word for word, _ in blank.words] == [tokenizer.tokens[i] for i in order]


def test_ids_beyond_the_tokenizer_are_never_offered() -> None:
    model = model_of(VOCABULARY + 8)
    with torch.no_grad():
        model.masked_lm.bias[VOCABULARY:] = 100.0
    (blank,) = fill_mask(model, tiny_tokenizer(), ["a [MASK]"], top=WORDS)[0]
    assert {word for word, _ in blank.words} == set(tiny_tokenizer().tokens[5:])
    # the likelihoods are those among the words there are
    assert blank.words[0][1] > 1 / WORDS


@pytest.mark.parametrize("top", [0, -1, WORDS + 1, 100_000_000])
def test_more_words_than_there_are(top) -> None:
    with pytest.raises(InputError, match=rf"--top must be from 1 to {WORDS}, .* got {top}"):
        fill_mask(model_of(VOCABULARY), tiny_tokenizer(), ["a [MASK]"], top=top)


def test_a_tokenizer_of_another_model() -> None:
    with pytest.raises(InputError, match=r"fill-mask: the tokenizer has .* not of one model"):
        fill_mask(model_of(VOCABULARY - 1), tiny_tokenizer(), ["a [MASK]"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value) -> None:
    model = model_of(VOCABULARY)
    with torch.no_grad():
        model.encoder.layers[0].output.weight[0, 0] = value
    with pytest.raises(InputError, match="the model's weights are not finite"):
        fill_mask(model, tiny_tokenizer(), ["a [MASK]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no blank", r"no \[MASK\] in 'no blank'"),
        ("half \ud800 [MASK]", r"half of a surrogate pair, which is no text, in 'half \\ud800"),
        ("river [MASK] " * 200, "tokens, the model has positions for 160"),
    ],
)
def test_texts_that_cannot_be_filled(text, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        fill_mask(model_of(VOCABULARY), tiny_tokenizer(), [text])
    assert "\n" not in str(caught.value)
