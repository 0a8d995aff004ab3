"""Texts to sequences: what stands around them, what is cut, windows over long ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.tokenizer import Tokenizer

# tokens a sequence at least, in every task
SHORTEST = 8


class Encoded(NamedTuple):
    """A text's tokens.

    Attributes:
        ids: [tokens] int64.
        offsets: [tokens, 2] int64, the characters each token came from.
    """

    ids: np.ndarray
    offsets: np.ndarray


class Joined(NamedTuple):
    """One sequence.

    Attributes:
        input_ids, token_type_ids: [tokens] int64.
        first, second: where the tokens of each text begin.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    first: int
    second: int


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Tokens of many texts with the characters they came from, nothing around them."""
    return [
        Encoded(
            np.array(encoding.ids, dtype=np.int64),
            np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2),
        )
        for encoding in tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
    ]


def encode_words(
    tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of sentences that are words already: ids, and which word each is of.

    Where a space belongs to the word after it, every word gets one, as transformers' tokenizers of
    such families want it (add_prefix_space).
    """
    before = " " if tokenizer.has_spaces_in_words else ""
    encodings = tokenizer.backend.encode_batch(
        [[f"{before}{word}" for word in words] for words in sentences],
        add_special_tokens=False,
        is_pretokenized=True,
    )
    return [
        (np.array(encoding.ids, dtype=np.int64), np.array(encoding.word_ids, dtype=np.int64))
        for encoding in encodings
    ]


class Template(NamedTuple):
    """What a tokenizer puts around texts: special ids and the segments of all parts.

    Attributes:
        ids: before the first text, after each.
        segments: of these and, one place further, of the texts between.
    """

    ids: tuple[tuple[int, ...], ...]
    segments: tuple[int, ...]


@lru_cache(maxsize=8)
def template(tokenizer: Tokenizer, pair: bool) -> Template:
    """Read off the tokenizer what stands around one text, or two.

    BERT has [CLS] first [SEP] second [SEP] with two segments (Devlin et al. 2018, figure 4);
    others have two separators between, or one segment.
    """
    cls, sep = (tokenizer.cls_id,), (tokenizer.sep_id,)
    usual = Template((cls, sep, sep), (0, 0, 0, 1, 1)) if pair else Template((cls, sep), (0, 0, 0))
    if tokenizer.backend.post_processor is None:
        return usual
    probe = tokenizer.backend.encode("a", "a") if pair else tokenizer.backend.encode("a")
    ids: list[list[int]] = [[]]
    segments: list[list[int]] = [[]]
    before = None
    for index, segment, text in zip(probe.ids, probe.type_ids, probe.sequence_ids, strict=True):
        if text is None:
            if before is not None:
                ids.append([])
                segments.append([])
            ids[-1].append(index)
        elif before != text:
            segments.append([])
        segments[-1].append(segment)
        before = text
    if len(ids) != (3 if pair else 2) or len(segments) != 2 * len(ids) - 1:
        return usual
    return Template(tuple(map(tuple, ids)), tuple(part[0] if part else 0 for part in segments))


def join(tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray | None = None) -> Joined:
    """One text or two with what the tokenizer puts around them."""
    texts = [first] if second is None else [first, second]
    around = template(tokenizer, second is not None)
    parts = [np.array(around.ids[0], dtype=np.int64)]
    for text, after in zip(texts, around.ids[1:], strict=True):
        parts += [text, np.array(after, dtype=np.int64)]
    lengths = list(map(len, parts))
    return Joined(
        np.concatenate(parts).astype(np.int64),
        np.repeat(np.array(around.segments, dtype=np.int64), lengths),
        lengths[0],
        sum(lengths[:3]),
    )


def room(tokenizer: Tokenizer, pair: bool, max_seq_len: int) -> int:
    """Tokens of text that a sequence has room for."""
    return max_seq_len - sum(map(len, template(tokenizer, pair).ids))


def cut_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of each text stays when the longer one loses its last token until both fit.

    At equal lengths the second one loses, as in google-research/bert.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if shorter <= room // 2:
        return (room - second, second) if first > second else (first, room - first)
    return room - room // 2, room // 2


def join_cut(
    tokenizer: Tokenizer, first: np.ndarray, second: np.ndarray | None, max_seq_len: int
) -> tuple[Joined, bool]:
    """As `join`, and whether the end of a text had to go."""
    space = room(tokenizer, second is not None, max_seq_len)
    of_one, of_two = cut_lengths(len(first), 0 if second is None else len(second), space)
    cut = of_one < len(first) or (second is not None and of_two < len(second))
    return join(tokenizer, first[:of_one], None if second is None else second[:of_two]), cut


def windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Stretches of at most `size` tokens that cover all, neighbours sharing `overlap`.

    Raises:
        InputError: no room to move on.
    """
    if not 0 <= overlap < size:
        raise InputError(
            f"--stride {overlap}: windows of {size} tokens of text must share fewer than that"
        )
    stretches = [(0, min(size, length))]
    while stretches[-1][1] < length:
        start = stretches[-1][0] + size - overlap
        stretches.append((start, min(start + size, length)))
    return stretches


def say_share(
    say: Callable[[str], None] | None, name: str, number: int, of: int, noun: str, what: str
) -> None:
    """What happened to some of all, if it happened at all."""
    if number and say:
        share = f" ({number / of:.1%})" if of >= 100 else ""
        say(f"{name or noun + 's'}: {number:,} of {counted(of, noun)}{share} {what}")
