"""Which words fit a blank: the masked-LM head's answer at every [MASK]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastbert.config import refuse_foreign_tokenizer
from fastbert.data.text_files import is_unicode
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer


@dataclass(frozen=True)
class Blank:
    """One [MASK]: its best words with their probabilities, the likeliest first."""

    words: tuple[tuple[str, float], ...]


def fill_mask(
    model: BertForMaskedLM | BertForPreTraining,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    top: int = 5,
) -> list[list[Blank]]:
    """Fill the blanks of each text.

    Args:
        model: with a masked-LM head.
        tokenizer: the model's.
        texts: each with at least one [MASK].
        top: words a blank.

    Returns:
        For each text its blanks, in order; special tokens are never offered.

    Raises:
        InputError: a text without [MASK], or longer than the model's positions; a tokenizer of
            another model; weights that are not finite.
    """
    most = tokenizer.vocab_size - len(tokenizer.special_ids)
    if not 1 <= top <= most:
        raise InputError(f"--top must be from 1 to {most:,}, the words there are, got {top}")
    refuse_foreign_tokenizer(tokenizer.vocab_size, model.config, "fill-mask")
    sequences = [_encode(tokenizer, text, model.config.max_seqlen) for text in texts]
    batch = Examples.from_lists(sequences).batch(range(len(sequences)))
    device = next(model.parameters()).device
    batch = batch.to(device)
    with torch.no_grad():
        hidden_states = model.encoder(batch)
        positions = (batch.input_ids == tokenizer.mask_id).nonzero().squeeze(1)
        logits = model.masked_lm(hidden_states[positions], model.word_weight).float()
    if not logits.isfinite().all():
        raise InputError("fill-mask: the model's weights are not finite")
    logits[:, list(tokenizer.special_ids)] = float("-inf")
    # a vocabulary padded to a round number has ids without a token
    logits[:, tokenizer.vocab_size :] = float("-inf")
    best = torch.softmax(logits, dim=-1).topk(top, dim=-1)
    blanks = [
        Blank(
            tuple(
                (tokenizer.id_to_token(index), probability)
                for index, probability in zip(ids, probabilities, strict=True)
            )
        )
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    result, first = [], 0
    for ids in sequences:
        count = ids.count(tokenizer.mask_id)
        result.append(blanks[first : first + count])
        first += count
    return result


def _encode(tokenizer: Tokenizer, text: str, limit: int) -> list[int]:
    if not is_unicode(text):
        raise InputError(f"fill-mask: half of a surrogate pair, which is no text, in {text[:40]!r}")
    ids = tokenizer.encode(text)
    if tokenizer.mask_id not in ids:
        raise InputError(f"fill-mask: no [MASK] in {text!r}; write it where a word is to be found")
    if len(ids) + 2 > limit:
        raise InputError(
            f"fill-mask: {len(ids) + 2} tokens, the model has positions for {limit}: {text[:40]!r}"
        )
    return [tokenizer.cls_id, *ids, tokenizer.sep_id]
