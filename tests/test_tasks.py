"""Every task from its files to answers: trained, saved, asked, scored, and read by transformers."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import ErrorRule
from tiny import WORDS, tiny_config, tiny_tokenizer

from fastbert import pipeline
from fastbert.cli import main
from fastbert.errors import InputError
from fastbert.models import BertForPreTraining
from fastbert.tasks.registry import TASKS, make_task
from fastbert.tasks.saved import Saved, is_task_folder
from fastbert.training import finetune as finetune_module
from fastbert.training.finetune import finetune
from fastbert.training.finetune_config import FinetuneConfig
from fastbert.training.task_evaluation import LARGEST_PICTURE, draw_confusion, evaluate_task

LAND, SEA = WORDS[:10], WORDS[10:]
Writer = Callable[[Path, int, np.random.Generator], str]


@dataclass(frozen=True)
class Case:
    """A task, files that a tiny model can learn, and what to ask afterwards.

    Attributes:
        write: writes a file of so many rows to a stem, and returns its name.
        figure, least: of the evaluation.
        ask: an input for the pipeline.
        keys: of the answer.
        auto: transformers' class that loads the model, None where it has none.
        options: of the task.
        epochs: of training.
    """

    task: str
    write: Writer
    figure: str
    least: float
    ask: Any
    keys: tuple[str, ...]
    auto: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    epochs: int = 8


def some(rng: np.random.Generator, words: list[str], least: int = 2, most: int = 8) -> str:
    return " ".join(rng.choice(words, int(rng.integers(least, most))))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    name = path.with_suffix(".jsonl")
    name.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(name)


def classes(path: Path, count: int, rng: np.random.Generator) -> str:
    sides = [("land", LAND), ("sea", SEA)]
    chosen = [sides[int(rng.integers(2))] for _ in range(count)]
    return jsonl(path, [{"text": some(rng, words), "label": name} for name, words in chosen])


def label_sets(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = []
    for _ in range(count):
        land, sea = rng.random(2) < 0.5
        words = [*([some(rng, LAND)] if land else []), *([some(rng, SEA)] if sea else [])]
        labels = [*(["land"] if land else []), *(["sea"] if sea else [])]
        rows.append({"text": " ".join(words), "labels": labels})
    return jsonl(path, rows)


def scored_pairs(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = ["sentence1\tsentence2\tscore"]
    for _ in range(count):
        sides = rng.integers(0, 2, 2)
        texts = [some(rng, (LAND, SEA)[side]) for side in sides]
        rows.append(f"{texts[0]}\t{texts[1]}\t{5.0 if sides[0] == sides[1] else 1.0}")
    path = path.with_suffix(".tsv")
    path.write_text("\n".join(rows))
    return str(path)


def landward_pairs(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = ["sentence1\tsentence2\tscore"]
    for _ in range(count):
        sides = rng.integers(0, 2, 2)
        texts = [some(rng, (LAND, SEA)[side]) for side in sides]
        rows.append(f"{texts[0]}\t{texts[1]}\t{2.5 * sides.sum():.1f}")
    path = path.with_suffix(".tsv")
    path.write_text("\n".join(rows))
    return str(path)


def tagged(path: Path, count: int, rng: np.random.Generator) -> str:
    lines = []
    for _ in range(count):
        for _ in range(int(rng.integers(1, 9))):
            if rng.random() < 0.3:
                lines += [f"{rng.choice(SEA[:5])}\tB-SHIP", f"{rng.choice(SEA[5:])}\tI-SHIP"]
            lines.append(f"{rng.choice(LAND)}\tO")
        lines.append(" \t")
    path = path.with_suffix(".conll")
    path.write_text("\n".join(lines))
    return str(path)


def questions(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = []
    for number in range(count):
        before, answer, after = some(rng, LAND, 1, 20), str(rng.choice(SEA)), some(rng, LAND, 1, 20)
        missing = number % 4 == 0
        context = f"{before} {after}" if missing else f"{before} {answer} {after}"
        found = {"text": [], "answer_start": []}
        if not missing:
            found = {"text": [answer], "answer_start": [len(before) + 1]}
        rows.append({"id": str(number), "question": "river?", "context": context, "answers": found})
    return jsonl(path, rows)


def choices(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = []
    for _ in range(count):
        size = int(rng.integers(2, 5))
        right = int(rng.integers(size))
        given = [some(rng, SEA if number == right else LAND) for number in range(size)]
        rows.append({"question": "harbour", "choices": given, "label": right})
    return jsonl(path, rows)


def relations(path: Path, count: int, rng: np.random.Generator) -> str:
    blocks = []
    for number in range(1, count + 1):
        by_sea = bool(rng.integers(2))
        one, two = (rng.choice(SEA if by_sea else LAND) for _ in range(2))
        sentence = f"{some(rng, LAND)} <e1>{one}</e1> {some(rng, LAND)} <e2>{two}</e2>"
        label = "Lies-By(e1,e2)" if by_sea else "Lies-By(e2,e1)"
        blocks.append(f'{number}\t"{sentence}"\r\n{label}\r\nComment:\r\n\r\n')
    path = path.with_suffix(".txt")
    path.write_text("".join(blocks), newline="")
    return str(path)


def utterances(path: Path, count: int, rng: np.random.Generator) -> str:
    columns: dict[str, list[str]] = {"seq.in": [], "seq.out": [], "label": []}
    for _ in range(count):
        walk = bool(rng.integers(2))
        words = [str(word) for word in rng.choice(LAND if walk else SEA, int(rng.integers(2, 7)))]
        columns["seq.in"].append(" ".join(words))
        tags = ["B-place" if word in ("river", "painter") else "O" for word in words]
        columns["seq.out"].append(" ".join(tags))
        columns["label"].append("Walk" if walk else "Sail")
    path.mkdir()
    for name, lines in columns.items():
        (path / name).write_text("\n".join(lines) + "\n")
    return str(path)


def pairs(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = []
    for _ in range(count):
        word = str(rng.choice(WORDS))
        rows.append({"anchor": f"{word} {rng.choice(WORDS)}", "positive": f"{word} {word}"})
    return jsonl(path, rows)


def ranked(path: Path, count: int, rng: np.random.Generator) -> str:
    rows = []
    for number in range(count // 4):
        good, bad = some(rng, SEA), [some(rng, LAND) for _ in range(3)]
        rows.append({"query": f"harbour {number}", "positives": [good], "negatives": bad})
    return jsonl(path, rows)


RELATION = "the <e1>river</e1> by the <e2>harbour</e2>"
CASES = [
    Case(
        "classify",
        classes,
        "accuracy",
        0.9,
        "river stone",
        ("label", "probabilities"),
        "AutoModelForSequenceClassification",
    ),
    Case(
        "classify",
        label_sets,
        "micro_f1",
        0.9,
        "river harbour",
        ("labels", "probabilities"),
        "AutoModelForSequenceClassification",
        (("multi_label", True),),
        20,
    ),
    Case(
        "similarity",
        landward_pairs,
        "spearman",
        0.5,
        ("river", "stone"),
        ("score",),
        "AutoModelForSequenceClassification",
    ),
    Case(
        "similarity",
        scored_pairs,
        "spearman",
        0.5,
        ("river", "stone"),
        ("score",),
        "AutoModel",
        (("manner", "cosine"),),
    ),
    Case(
        "tag",
        tagged,
        "f1",
        0.9,
        "river harbour thunder",
        ("tags", "entities"),
        "AutoModelForTokenClassification",
    ),
    Case(
        "tag",
        tagged,
        "f1",
        0.9,
        {"tokens": ["river", "harbour", "thunder"]},
        ("tags", "entities"),
        "AutoModelForTokenClassification",
        (("crf", True),),
    ),
    Case(
        "answer",
        questions,
        "f1",
        0.7,
        {"question": "river?", "context": "river stone harbour stone"},
        ("answer",),
        "AutoModelForQuestionAnswering",
        (("stride", 4), ("max_question_len", 4)),
    ),
    Case(
        "choose",
        choices,
        "accuracy",
        0.9,
        {"question": "harbour", "choices": ["river", "harbour"]},
        ("choice", "probabilities"),
        "AutoModelForMultipleChoice",
    ),
    Case("relation", relations, "accuracy", 0.9, RELATION, ("label", "head"), "AutoModel"),
    Case("intent", utterances, "exact", 0.8, "river stone", ("intent", "slots"), "AutoModel"),
    Case("embed", pairs, "recall_at_10", 0.8, "river stone", ("embedding",), "AutoModel"),
    Case(
        "rerank",
        ranked,
        "mrr_at_10",
        0.9,
        ("harbour", "thunder"),
        ("relevance",),
        "AutoModelForSequenceClassification",
    ),
    Case(
        "rerank",
        ranked,
        "accuracy",
        0.9,
        ("harbour", "thunder"),
        ("relevance",),
        "AutoModelForSequenceClassification",
        (("manner", "passages"),),
    ),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    config = tiny_config(
        vocab_size=tiny_tokenizer().vocab_size, labels=[], max_position_embeddings=32
    )
    BertForPreTraining.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_for(start: Path, train: str, evaluation: str, out: Path, **fields) -> FinetuneConfig:
    settings = {
        "epochs": 8,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "dropout": 0.0,
        "dtype": "fp32",
        "evaluate_epochs": 0,
    }
    return FinetuneConfig(str(start), train, evaluation, str(out), **{**settings, **fields})


def test_every_task_has_a_case() -> None:
    assert {case.task for case in CASES} == set(TASKS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.task}-{case.figure}")
def test_from_files_to_answers(case, start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)
    rng = np.random.default_rng(0)
    train, dev = case.write(tmp_path / "train", 160, rng), case.write(tmp_path / "dev", 40, rng)
    out = tmp_path / "run"
    said: list[str] = []
    options = dict(case.options)
    report = finetune(
        make_task(case.task, **options),
        config_for(start, train, dev, out, epochs=case.epochs),
        say=said.append,
    )
    assert report[case.figure] >= case.least
    # what was read is told before anything is trained
    assert any(line.startswith(f"{train}: first ") for line in said)
    # asked again from the folder alone, the model scores what the report says
    saved = Saved.from_pretrained(out)
    rows = saved.task.read(dev, said.append)
    assert report["train_rows"] == len(saved.task.read(train, said.append))
    assert report["eval_rows"] == len(rows)
    units = saved.build(rows)
    raw = saved.run(units)
    figures = saved.task.score(rows, units, raw).figures
    assert figures == {name: report[name] for name in figures}
    answers = saved.task.answers(rows, units, raw)
    assert len(answers) == len(rows)
    json.dumps(answers)
    asked = pipeline(case.task, out, device="cpu")
    one = asked(case.ask)
    assert set(case.keys) <= set(one)
    assert [set(answer) for answer in asked([case.ask, case.ask])] == [set(one), set(one)]
    assert is_task_folder(out)
    if case.task != "embed":
        lines = evaluate_task(out, [dev], dtype="fp32", out=tmp_path / "scores", say=said.append)
        assert f"{report[case.figure]:.4f}" in next(
            li for li in lines if li.startswith(case.figure)
        )
        judged = [saved.task.is_right(r, a) for r, a in zip(rows, answers, strict=True)]
        errors = tmp_path / "scores" / "errors.jsonl"
        # a score is neither right nor wrong
        assert errors.exists() == (None not in judged)
        if errors.exists():
            assert len(errors.read_text().splitlines()) == judged.count(False)
    if case.auto:
        same_as_transformers(case, out / "model", units)


def same_as_transformers(case: Case, folder: Path, units) -> None:
    """transformers' class loads the folder, and says the same of sequences alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is in the test extra")
    theirs = getattr(transformers, case.auto).from_pretrained(folder).eval()
    ours = Saved.from_pretrained(folder).models[0]
    body, exact = getattr(ours, "body", ours), copy.deepcopy(theirs).double()
    rule = ErrorRule()
    for number in range(3):
        ids, types = (
            torch.from_numpy(values[number])[None]
            for values in (units.input_ids, units.token_type_ids)
        )
        inputs = {"input_ids": ids, "token_type_ids": types}
        if case.task == "choose":
            inputs = {name: values[None] for name, values in inputs.items()}
        with torch.no_grad():
            found = [model(**inputs)[0] for model in (body, theirs, exact)]
        rule.compare("output", *(values.flatten() for values in found))
    rule.assert_within(3)


def test_a_model_of_another_task_is_refused(start, tmp_path) -> None:
    with pytest.raises(InputError, match=r"task must be one of classify, .*fill-mask, got 'sing'"):
        pipeline("sing", start)
    with pytest.raises(InputError, match="nothing says what this model was trained for"):
        pipeline("tag", start)
    assert not is_task_folder(start)


def test_fill_mask_is_a_pipeline_too(start) -> None:
    blanks = pipeline("fill-mask", start)("river [MASK] stone [MASK]", top=3)
    assert [len(words) for words in blanks] == [3, 3]


def test_flags_that_another_kind_of_model_looks_at(start, tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    train = classes(tmp_path / "train", 8, rng)
    out = tmp_path / "run"
    config = config_for(start, train, train, out, max_steps=1, epochs=None)
    finetune(make_task("classify"), config, say=lambda _: None)
    for flag, value in (("--max-seq-len", "16"), ("--objective", "mlm"), ("--doc-sep", "line")):
        assert main(["evaluate", "--model", str(out), train, flag, value]) == 2
        assert f"{flag} is for pre-trained models on text" in capsys.readouterr().err
    for flag, value in (("--out", str(tmp_path / "scores")), ("--encoding", "utf-8")):
        assert main(["evaluate", "--model", str(start), train, flag, value]) == 2
        assert f"{flag} is for fine-tuned models" in capsys.readouterr().err
    row = '{"text": "caf\u00e9", "label": "land"}\n{"text": "river", "label": "sea"}\n'
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(row.encode("latin-1"))
    assert main(["evaluate", "--model", str(out), str(latin)]) == 2
    assert "--encoding names another" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(out), str(latin), "--encoding", "iso-8859-1"]) == 0


@pytest.mark.parametrize("count", [3, 150])
def test_confusion_of_any_classes_is_a_picture_that_fits(tmp_path, count) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the plot extra")
    odd = ["$a_$ b", "天气查询", "x" * 300]
    names = [*odd, *(f"class {number}" for number in range(count - 3))]
    with warnings.catch_warnings():
        # a glyph that the font lacks is a warning
        warnings.simplefilter("error")
        draw_confusion(tmp_path / "a.png", np.eye(count, dtype=np.int64), names)
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert width == height <= 110 * LARGEST_PICTURE
