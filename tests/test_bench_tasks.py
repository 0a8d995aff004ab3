from __future__ import annotations

import json
import math

import pytest

from fastbert.bench import tasks
from fastbert.bench.task_cases import CASES
from fastbert.bench.task_data import BM25, Cranfield, bm25_figures, cranfield_pairs, trec
from fastbert.errors import InputError
from fastbert.tasks.registry import TASKS, make_task
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


def test_trec_has_six_classes(data, tmp_path) -> None:
    if not (data / "classification" / "trec6").is_dir():
        pytest.skip(f"the public data at {data} lack classification/trec6")
    files = trec(data, tmp_path)
    task = make_task("classify")
    rows = task.read(str(files.train), lambda _: None)
    task.fit(rows)
    assert len(rows) == 5452 and task.labels == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    assert len(task.read(str(files.evaluation), lambda _: None)) == 500


def test_the_table_says_what_is_not_measured(tmp_path) -> None:
    result = {
        "figures": {"accuracy": 0.956},
        "seconds": 61.2,
        "rows": 5452,
        "real_tokens_per_s": 5000.0,
        "machine": {"cpu": "a CPU", "threads": 2, "torch": "2", "python": "3", "commit": "abc"},
    }
    (tmp_path / "runs" / "trec").mkdir(parents=True)
    (tmp_path / "runs" / "trec" / "result.json").write_text(json.dumps(result))
    tasks.write_table(tmp_path / "docs" / "results.md", tmp_path / "runs", "models/small/model")
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "| trec | classify | test | accuracy 95.6 | accuracy 95 | 5,452 | 61 | 5,000 |" in text
    assert text.count("not measured") == len(CASES) - 1
    assert "a CPU, 2 threads, torch 2, Python 3, commit abc." in text
