from __future__ import annotations

import math

import numpy as np
import torch
from test_tasks import start as start

from fastbert.tasks.rerank import Rerank, order_figures
from fastbert.tasks.table import Row


def rows_of(relevant: int, others: int) -> list[Row]:
    return [
        *(Row("river", "1", f"stone {number}") for number in range(relevant)),
        *(Row("river", "0", f"winter {number}") for number in range(others)),
    ]


def test_a_fresh_head_starts_at_the_odds_of_any_passage(start, tmp_path) -> None:
    task = Rerank()
    task.fit(rows_of(2, 14))
    model, fresh = task.load(start)
    assert fresh == ["classifier"]
    assert model.classifier.dense.bias.tolist() == [float(np.float32(math.log(1 / 7)))]
    # what was trained stays: only a fresh head knows nothing
    torch.nn.init.constant_(model.classifier.dense.bias, 0.25)
    task.save_model(model, tmp_path)
    (tmp_path / "task.json").write_text('{"task": "rerank"}')
    again, fresh = task.load(tmp_path)
    assert fresh == [] and again.classifier.dense.bias.tolist() == [0.25]


def test_passages_are_ordered_within_their_query_the_greatest_first() -> None:
    rows = [Row("q", "0", "a"), Row("r", "1", "a"), Row("q", "2", "b"), Row("q", "0", "c")]
    assert order_figures(rows, np.array([0.1, 0.0, 0.9, 0.5])) == {
        "ndcg_at_10": 1.0,
        "mrr_at_10": 1.0,
    }
    # second of one query, first of the other
    found = order_figures(rows, np.array([0.9, -9.0, 0.5, 0.1]))
    assert found == {"ndcg_at_10": (1 / math.log2(3) + 1) / 2, "mrr_at_10": 0.75}
