from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from fastbert.errors import InputError
from fastbert.tasks.pairs import pair_units
from fastbert.tasks.sequences import cut_lengths, encode, encode_words, windows
from fastbert.tasks.table import Row
from fastbert.tasks.units import Units


def units_of(texts: list[str], seconds: list[str] | None = None, length: int = 160) -> Units:
    pairs = seconds or [None] * len(texts)
    rows = [Row(text, second=second) for text, second in zip(texts, pairs, strict=True)]
    return pair_units(rows, tiny_tokenizer(), length)


def test_sequences_are_laid_out_as_the_tokenizer_says() -> None:
    tokenizer = tiny_tokenizer()
    texts, seconds = ["River stone.", "", "winter"], ["A bridge!", "window", ""]
    for units, others in ((units_of(texts, seconds), seconds), (units_of(texts), [None] * 3)):
        for number, (text, other) in enumerate(zip(texts, others, strict=True)):
            encoded = tokenizer.backend.encode(text, other)
            assert units.input_ids[number].tolist() == encoded.ids
            assert units.token_type_ids[number].tolist() == encoded.type_ids


@given(st.integers(0, 40), st.integers(0, 40), st.integers(5, 30))
def test_the_longer_text_loses_its_end_token_by_token(first, second, room) -> None:
    expected = [first, second]
    while sum(expected) > room:
        expected[0 if expected[0] > expected[1] else 1] -= 1
    assert cut_lengths(first, second, room) == tuple(expected)


def test_cut_texts_are_counted() -> None:
    said: list[str] = []
    rows = [Row("river " * 20), Row("river"), Row("river " * 3, second="stone " * 30)]
    units = pair_units(rows, tiny_tokenizer(), 12, name="dev", say=said.append)
    assert said == ["dev: 2 of 3 texts cut to 12 tokens"]
    assert units.lengths.max() == 12
    assert all(ids[-1] == tiny_tokenizer().sep_id for ids in units.input_ids)
    pair_units(rows[1:2], tiny_tokenizer(), 12, say=said.append)
    assert len(said) == 1


@given(st.integers(0, 300), st.integers(2, 40), st.integers(0, 39))
def test_windows_cover_all_and_share_what_is_asked(length, size, overlap) -> None:
    overlap = min(overlap, size - 1)
    found = windows(length, size, overlap)
    assert found[0][0] == 0 and found[-1][1] == length
    assert all(end - start == size for start, end in found[:-1])
    for (_, end), (start, _) in itertools.pairwise(found):
        assert end - start == overlap
    # the last one brings something new
    assert len(found) == 1 or found[-1][1] > found[-2][1]


def test_windows_must_move() -> None:
    with pytest.raises(InputError, match="--stride 10: windows of 10 tokens"):
        windows(20, 10, 10)


def test_windows_of_a_long_pair_keep_the_second_text() -> None:
    rows = [Row("river " * 40, second="stone bridge")]
    units = pair_units(rows, tiny_tokenizer(), 20, windowed=True, stride=4)
    second = tiny_tokenizer().encode("stone bridge")
    assert len(units.input_ids) > 2 and len(units) == 1
    assert all(ids[-len(second) - 1 : -1].tolist() == second for ids in units.input_ids)
    assert all(len(ids) <= 20 for ids in units.input_ids)


def test_offsets_are_characters_of_the_text() -> None:
    [found] = encode(tiny_tokenizer(), ["River  STONE, harbour"])
    text = "River  STONE, harbour"
    pieces = "".join(text[start:end] for start, end in found.offsets)
    assert pieces == text.replace(" ", "")


def test_words_keep_their_numbers() -> None:
    [(ids, words)] = encode_words(tiny_tokenizer(), [["river", "harbour-thunder", "\u200b", "x"]])
    assert len(ids) == len(words) and sorted(set(words.tolist())) == [0, 1, 3]


def test_units_of_several_sequences_stay_together() -> None:
    ids = [np.arange(1, n + 1) for n in (3, 2, 4, 1)]
    units = Units(
        ids,
        [np.zeros_like(one) for one in ids],
        cu_units=np.array([0, 1, 3, 4]),
        unit_labels=np.array([0, -100, 1]),
        places=np.array([[0, 1], [1, -1], [3, 0], [0, 0]]),
        token_labels=[one % 3 - 1 for one in ids],
    )
    assert units.lengths.tolist() == [3, 6, 1] and units.rows.tolist() == [0, 1, 1, 2]
    batch = units.batch([2, 1])
    assert batch.cu_units.tolist() == [0, 1, 3] and batch.cu_seqlens.tolist() == [0, 1, 3, 7]
    assert batch.input_ids.tolist() == [1, 1, 2, 1, 2, 3, 4]
    assert batch.unit_labels.tolist() == [1, -100] and batch.num_labelled == 1
    assert batch.places.tolist() == [[0, 0], [2, -100], [6, 3]]
    assert batch.token_labels.tolist() == [0, 0, 1, 0, 1, -1, 0]
    moved = batch.to("cpu")
    assert moved.cu_units.tolist() == [0, 1, 3] and moved.max_seqlen == 4
