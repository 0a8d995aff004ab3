from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle import SEEDS, ErrorRule
from tiny import stirred, task_gradients, tiny_config, tiny_documents, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.metrics.classification import accuracy, macro_f1, majority
from fastbert.models import BertForSequenceClassification
from fastbert.tasks.classify import Classify
from fastbert.tasks.inference import run, sigmoid, softmax
from fastbert.tasks.labels import check_labels, label_set
from fastbert.tasks.losses import Shaping
from fastbert.tasks.saved import Saved
from fastbert.tasks.table import Row

LABELS = ["first", "second", "third"]


def fresh(seed: int = 0, **fields) -> BertForSequenceClassification:
    fields.setdefault("vocab_size", tiny_tokenizer().vocab_size)
    model = BertForSequenceClassification.from_config(tiny_config(**fields), seed)
    return stirred(model, seed).eval()


def task_of(rows: list[Row] | None = None, **options) -> Classify:
    task = Classify(**options)
    task.labels = LABELS
    task.pair = bool(rows and rows[0].second is not None)
    task.max_seq_len = 160
    return task


def documents(count: int, seed: int = 0) -> list[Row]:
    texts = tiny_documents(count, seed=seed)
    return [Row(text, LABELS[n % 3], line=n + 1) for n, text in enumerate(texts)]


def one_at_a_time(model, units) -> torch.Tensor:
    """Logits by the padded call, each sequence alone."""
    rows = [
        model(torch.from_numpy(ids)[None], token_type_ids=torch.from_numpy(types)[None]).logits
        for ids, types in zip(units.input_ids, units.token_type_ids, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("token_budget", [1, 300, 4096])
def test_packed_logits_are_those_of_each_sequence_alone(token_budget) -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        model, task = fresh(seed), task_of()
        units = task.build(documents(8, seed), tiny_tokenizer())
        ours = torch.from_numpy(run(task, model, units, token_budget=token_budget).sequences)
        with torch.no_grad():
            baseline = one_at_a_time(model, units)
            oracle = one_at_a_time(copy.deepcopy(model).double(), units)
        rule.compare("logits", ours, baseline, oracle)
    rule.assert_within()


def test_answers_come_in_the_order_of_the_texts() -> None:
    texts = tiny_documents(12)
    saved = Saved(task_of(), [fresh()], tiny_tokenizer())
    found = [answer["probabilities"]["first"] for answer in saved.ask(texts, token_budget=200)]
    alone = [saved.ask([text])[0]["probabilities"]["first"] for text in texts]
    assert np.argsort(alone).tolist() == np.argsort(found).tolist() != list(range(len(texts)))


def test_softmax_and_sigmoid_of_huge_logits() -> None:
    assert softmax(np.array([[1000.0, 1000.0], [-1000.0, 1000.0]])).tolist() == [
        [0.5, 0.5],
        [0.0, 1.0],
    ]
    assert sigmoid(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0.0, 0.5, 1.0]


def test_no_texts_give_no_answers_and_an_empty_text_has_one() -> None:
    saved = Saved(task_of(), [fresh()], tiny_tokenizer())
    assert saved.ask([]) == []
    assert len(saved.ask(["", "river"])) == 2


def test_one_text_where_two_are_needed() -> None:
    saved = Saved(task_of(), [fresh()], tiny_tokenizer())
    with pytest.raises(InputError, match="inputs:2: this model was trained on one text a row"):
        saved.ask(["a", ("b", "c")])
    saved.task.pair = True
    with pytest.raises(InputError, match="inputs:1: this model was trained on two texts a row"):
        saved.ask([{"text": "a"}])
    with pytest.raises(InputError, match="inputs:1: a text, two texts or a dictionary is wanted"):
        saved.ask([5])


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
    assert label_set(labels.split()) == expected


def test_one_class_is_none() -> None:
    with pytest.raises(
        InputError, match=r"train.tsv: at least 2 different labels .* found 1 \(a\)"
    ):
        label_set(["a", "a"], "train.tsv")


def test_a_column_of_numbers_of_rows_is_no_class() -> None:
    with pytest.raises(InputError, match=r"30 different labels in 40 rows .* --label-column"):
        Classify().fit([Row("river", label) for label in [*map(str, range(30)), *["0"] * 10]])
    # other tasks have no such flag
    with pytest.raises(InputError, match=r"30 different labels in 40 rows are no classes$"):
        label_set([*map(str, range(30)), *["0"] * 10])


def test_a_class_seen_only_in_evaluation_is_named_with_its_line() -> None:
    found = list(enumerate("abde", 2))
    check_labels(found[:2], ["a", "b", "c"])
    with pytest.raises(InputError, match=r"dev.tsv:4: the class 'd' is not among .* \(a, b, c\)"):
        check_labels(found, ["a", "b", "c"], "dev.tsv")


def test_scores_are_those_of_the_answers() -> None:
    rows, model = documents(12), fresh()
    saved = Saved(task_of(), [model], tiny_tokenizer())
    units = saved.build(rows)
    assert units.unit_labels.tolist() == [0, 1, 2] * 4
    scores = saved.task.score(rows, units, saved.run(units, token_budget=300))
    answers = saved.ask([row.text for row in rows], token_budget=300)
    predicted = np.array([LABELS.index(answer["label"]) for answer in answers])
    assert scores.figures["accuracy"] == accuracy(predicted, units.unit_labels)
    assert scores.figures["macro_f1"] == macro_f1(predicted, units.unit_labels)
    assert scores.figures["majority"] == majority(units.unit_labels) == 4 / 12
    counts, names = scores.confusion
    assert (
        names == LABELS and counts.sum() == 12 and [row.support for row in scores.table] == [4] * 3
    )
    right = [saved.task.is_right(row, answer) for row, answer in zip(rows, answers, strict=True)]
    assert sum(right) / 12 == scores.figures["accuracy"]


def test_loss_is_the_models_mean_loss() -> None:
    rule = ErrorRule()
    for seed in SEEDS:
        model, task, rows = fresh(seed), task_of(), documents(9, seed)
        units = task.build(rows, tiny_tokenizer())
        figures = task.score(rows, units, run(task, model, units)).figures
        labels = torch.from_numpy(units.unit_labels)
        with torch.no_grad():
            baseline = torch.nn.functional.cross_entropy(one_at_a_time(model, units), labels)
            wide = one_at_a_time(copy.deepcopy(model).double(), units)
            oracle = torch.nn.functional.cross_entropy(wide, labels)
        rule.compare("loss", torch.tensor(figures["loss"], dtype=torch.float32), baseline, oracle)
    rule.assert_within()


def gradients(task, model, units, shaping=None) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    task_gradients(task, model, [units.batch(range(len(units)))], shaping)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shaped", [False, True])
def test_gradients_are_those_of_the_padded_loss(shaped) -> None:
    rule = ErrorRule()
    weights = torch.tensor([0.5, 1.0, 2.0])
    shaping = Shaping(weights, 0.1) if shaped else Shaping()
    for seed in SEEDS:
        model, task = fresh(seed), task_of()
        units = task.build(documents(7, seed), tiny_tokenizer())
        labels = torch.from_numpy(units.unit_labels)
        found = [gradients(task, model, units, shaping)]
        for dtype in (torch.float32, torch.float64):
            padded = copy.deepcopy(model).to(dtype)
            loss = torch.nn.functional.cross_entropy(
                one_at_a_time(padded, units),
                labels,
                weight=weights.to(dtype) if shaped else None,
                label_smoothing=0.1 if shaped else 0.0,
                reduction="sum",
            )
            (loss / len(labels)).backward()
            named = padded.named_parameters()
            found.append({name: p.grad for name, p in named if p.grad is not None})
        assert found[0].keys() == found[2].keys()
        # as one vector: among dozens of small tensors one is out by chance
        ours, baseline, oracle = (
            torch.cat([grads[name].flatten() for name in found[2]]) for grads in found
        )
        rule.compare("gradient", ours, baseline, oracle)
    rule.assert_within()


def test_any_number_of_labels() -> None:
    rows = [
        Row("river", "", None, 1, ("first", "third")),
        Row("stone", "", None, 2, ()),
        Row("bridge", "", None, 3, ("second",)),
    ]
    task = Classify(multi_label=True)
    task.fit(rows)
    task.max_seq_len = 40
    assert task.labels == LABELS
    units = task.build(rows, tiny_tokenizer())
    assert units.values.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert task.class_counts(units).tolist() == [1, 1, 1]
    saved = Saved(task, [fresh()], tiny_tokenizer())
    raw = saved.run(units)
    answers = task.answers(rows, units, raw)
    for answer, logits in zip(answers, raw.sequences, strict=True):
        assert answer["labels"] == [n for n, v in zip(LABELS, logits, strict=True) if v > 0]
    raw.sequences = np.where(units.values > 0, 5.0, -5.0)
    assert task.score(rows, units, raw).figures == {"exact": 1.0, "micro_f1": 1.0, "macro_f1": 1.0}
    task.check(rows)
    with pytest.raises(InputError, match="dev:4: the class 'fourth'"):
        task.check([Row("x", "", None, 4, ("fourth",))], "dev")


@pytest.mark.parametrize("how", ["mean", "max"])
def test_long_texts_are_pooled_over_windows(how) -> None:
    rows = [Row("river stone " * 30, "first"), Row("winter", "second")]
    said: list[str] = []
    task = task_of(long_text=how, stride=5)
    task.max_seq_len = 16
    units = task.build(rows, tiny_tokenizer(), name="dev", say=said.append)
    assert said == ["dev: 1 of 2 texts windowed"]
    counts = np.diff(units.cu_units)
    assert counts[0] > 3 and counts[1] == 1 and units.rows.tolist() == [0] * counts[0] + [1]
    model = fresh()
    ours = run(task, model, units)
    assert len(ours.sequences) == 2
    with torch.no_grad():
        alone = one_at_a_time(model, units)
    expected = alone[: counts[0]].mean(0) if how == "mean" else alone[: counts[0]].amax(0)
    wide = one_at_a_time(copy.deepcopy(model).double(), units)[: counts[0]].detach()
    rule = ErrorRule()
    oracle = wide.mean(0) if how == "mean" else wide.amax(0)
    rule.compare("pooled", torch.from_numpy(ours.sequences[0]), expected, oracle)
    rule.assert_within(1)
    assert len(task.answers(rows, units, ours)) == 2
    loss = gradients(task, model, units)
    assert all(grad.isfinite().all() for grad in loss.values())


def test_bad_options() -> None:
    with pytest.raises(InputError, match="--long-text must be one of first, mean, max"):
        Classify(long_text="last")
    with pytest.raises(InputError, match="--label-separator must not be empty"):
        Classify(multi_label=True, label_separator="")
