from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import SEEDS, ErrorRule
from tiny import stirred, tiny_config, tiny_documents, tiny_examples, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.metrics.classification import accuracy, macro_f1, majority
from fastbert.models import BertForSequenceClassification
from fastbert.tasks.classify import (
    Predictions,
    build_examples,
    check_labels,
    classify,
    cut_lengths,
    label_set,
    logits,
    score,
    softmax,
)
from fastbert.tasks.table import Row

LENGTHS = [12, 3, 40, 1, 17, 40, 2, 90]


def fresh(seed: int = 0, **fields) -> BertForSequenceClassification:
    fields.setdefault("vocab_size", tiny_tokenizer().vocab_size)
    model = BertForSequenceClassification.from_config(tiny_config(**fields), seed)
    return stirred(model, seed)


def one_at_a_time(model, examples) -> torch.Tensor:
    """Logits by the padded call, each sequence alone."""
    bounds = zip(examples.cu_seqlens[:-1], examples.cu_seqlens[1:], strict=True)
    rows = [
        model(
            torch.from_numpy(examples.input_ids[start:end])[None],
            token_type_ids=torch.from_numpy(examples.token_type_ids[start:end])[None],
        ).logits
        for start, end in bounds
    ]
    return torch.cat(rows)


def examples_of(texts: list[str], max_seq_len: int = 160, seconds: list[str] | None = None):
    pairs = seconds or [None] * len(texts)
    rows = [Row(text, second=second) for text, second in zip(texts, pairs, strict=True)]
    return build_examples(rows, tiny_tokenizer(), None, max_seq_len)


def rows(*labels: str) -> list[Row]:
    return [Row("text", label, None, line) for line, label in enumerate(labels, 2)]


@pytest.mark.parametrize("token_budget", [1, 64, 4096])
def test_packed_logits_are_those_of_each_sequence_alone(token_budget) -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        model, examples = fresh(seed), tiny_examples(LENGTHS, masked=False, seed=seed)
        ours = torch.from_numpy(logits(model, examples, token_budget=token_budget))
        with torch.no_grad():
            baseline = one_at_a_time(model, examples)
            oracle = one_at_a_time(copy.deepcopy(model).double(), examples)
        rule.compare("logits", ours, baseline, oracle)
    rule.assert_within()


def test_answers_come_in_the_order_of_the_texts() -> None:
    model, texts = fresh(), tiny_documents(12)
    found = classify(model, tiny_tokenizer(), texts, token_budget=200)
    assert isinstance(found, Predictions)
    by_sureness = np.argsort(found.probabilities[:, 0])
    alone = [classify(model, tiny_tokenizer(), [text]).probabilities[0, 0] for text in texts]
    assert np.argsort(alone).tolist() == by_sureness.tolist()
    assert by_sureness.tolist() != list(range(len(texts)))


def test_probabilities_belong_to_the_labels() -> None:
    found = classify(fresh(), tiny_tokenizer(), tiny_documents(5))
    assert found.probabilities.shape == (5, 3) and found.probabilities.dtype == np.float32
    names = np.array(["first", "second", "third"])
    assert found.labels == names[found.probabilities.argmax(axis=1)].tolist()


def test_softmax_of_huge_logits() -> None:
    assert softmax(np.array([[1000.0, 1000.0], [-1000.0, 1000.0]])).tolist() == [
        [0.5, 0.5],
        [0.0, 1.0],
    ]


def test_no_texts_give_no_answers() -> None:
    found = classify(fresh(), tiny_tokenizer(), [])
    assert found.labels == [] and found.probabilities.shape == (0, 3)


def test_an_empty_text_has_an_answer() -> None:
    assert len(classify(fresh(), tiny_tokenizer(), ["", "river"]).labels) == 2


def test_second_texts_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 texts but 1 second texts"):
        classify(fresh(), tiny_tokenizer(), ["a", "b"], ["c"])


def test_sequences_are_laid_out_as_the_tokenizer_says() -> None:
    tokenizer = tiny_tokenizer()
    texts, seconds = ["River stone.", "", "winter"], ["A bridge!", "window", ""]
    for examples, others in (
        (examples_of(texts, seconds=seconds), seconds),
        (examples_of(texts), [None] * 3),
    ):
        for number, (text, other) in enumerate(zip(texts, others, strict=True)):
            own = slice(*examples.cu_seqlens[number : number + 2])
            encoded = tokenizer.backend.encode(text, other)
            assert examples.input_ids[own].tolist() == encoded.ids
            assert examples.token_type_ids[own].tolist() == encoded.type_ids


@given(st.integers(0, 40), st.integers(0, 40), st.integers(5, 30))
def test_the_longer_text_loses_its_end_token_by_token(first, second, room) -> None:
    expected = [first, second]
    while sum(expected) > room:
        expected[0 if expected[0] > expected[1] else 1] -= 1
    assert cut_lengths(first, second, room) == tuple(expected)


def test_cut_texts_are_counted() -> None:
    said: list[str] = []
    texts = [Row("river " * 20), Row("river"), Row("river " * 3, second="stone " * 30)]
    examples = build_examples(texts, tiny_tokenizer(), None, 12, name="dev", say=said.append)
    assert said == ["dev: 2 of 3 texts cut to 12 tokens"]
    assert examples.lengths.max() == 12
    sep = tiny_tokenizer().sep_id
    assert all(examples.input_ids[end - 1] == sep for end in examples.cu_seqlens[1:])
    build_examples(texts[1:2], tiny_tokenizer(), None, 12, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("b a c a", ["a", "b", "c"]),
        ("10 2 1", ["1", "2", "10"]),
        ("-1 0.5 -0.5 1e1", ["-1", "-0.5", "0.5", "1e1"]),
        ("10 2 x", ["10", "2", "x"]),
        ("nan 10 2", ["10", "2", "nan"]),
        ("1.0 1", ["1", "1.0"]),
    ],
)
def test_label_sets_are_sorted_and_numbers_by_value(labels, expected) -> None:
    assert label_set(rows(*labels.split())) == expected


def test_one_class_is_none() -> None:
    with pytest.raises(
        InputError, match=r"train.tsv: at least 2 different labels .* found 1 \(a\)"
    ):
        label_set(rows("a", "a"), "train.tsv")


def test_a_column_of_numbers_of_rows_is_no_class() -> None:
    with pytest.raises(InputError, match=r"30 different labels in 40 rows .* --label-column"):
        label_set(rows(*map(str, range(30)), *["0"] * 10))


def test_a_class_seen_only_in_evaluation_is_named_with_its_line() -> None:
    check_labels(rows("a", "b"), ["a", "b", "c"])
    with pytest.raises(InputError, match=r"dev.tsv:4: the class 'd' is not among .* \(a, b, c\)"):
        check_labels(rows("a", "b", "d", "e"), ["a", "b", "c"], "dev.tsv")


def test_targets_are_places_in_the_label_set() -> None:
    examples = build_examples(rows("b", "a", "b"), tiny_tokenizer(), ["a", "b"], 20)
    assert examples.sequence_labels is not None
    assert examples.sequence_labels.tolist() == [1, 0, 1]


def test_scores_are_those_of_the_answers() -> None:
    model, texts = fresh(), tiny_documents(12)
    labelled = [Row(text, ("first", "second")[i % 3 == 0]) for i, text in enumerate(texts)]
    examples = build_examples(labelled, tiny_tokenizer(), model.config.labels, 160)
    figures = score(model, examples, token_budget=300)
    answers = classify(model, tiny_tokenizer(), texts, token_budget=300).labels
    predicted = np.array([model.config.labels.index(answer) for answer in answers])
    labels = examples.sequence_labels
    assert figures["accuracy"] == accuracy(predicted, labels)
    assert figures["macro_f1"] == macro_f1(predicted, labels)
    assert figures["majority"] == majority(labels) == 8 / 12


def test_loss_is_the_models_mean_loss() -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        model = fresh(seed)
        examples = tiny_examples(LENGTHS, masked=False, classes=3, seed=seed)
        ours = torch.tensor(score(model, examples)["loss"], dtype=torch.float32)
        batch = examples.batch(range(len(examples)))
        with torch.no_grad():
            rule.compare("loss", ours, model(batch).loss, copy.deepcopy(model).double()(batch).loss)
    rule.assert_within()
