from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fastbert.bench import matrix_share
from fastbert.bench.registry import Case, Provider, Work, measure
from fastbert.bench.timing import interleaved_ms


def test_products_count_and_nothing_else():
    averages = [
        SimpleNamespace(key=name, self_cpu_time_total=time)
        for name, time in [("aten::mm", 5.0), ("aten::bmm", 1.0), ("aten::add", 3.0), ("x", 1.0)]
    ]
    assert matrix_share.share_of(averages) == 0.6
    assert matrix_share.share_of([]) == 0.0


def test_a_step_of_products_and_one_without():
    a = torch.randn(256, 256)
    q = torch.randn(1, 4, 128, 64)
    assert matrix_share.matrix_share(lambda: a @ a) > 0.5
    if torch.backends.mkldnn.is_available():
        onednn = functools.partial(torch.ops.mkldnn._linear_pointwise, a, a, None, "none", [], "")
        assert matrix_share.matrix_share(onednn) > 0.5
    # under whatever name torch's attention goes, it is found
    assert matrix_share.matrix_share(lambda: F.scaled_dot_product_attention(q, q, q)) > 0.5
    assert matrix_share.matrix_share(lambda: a + a) == 0.0


def test_a_row_has_its_share_where_the_case_asks():
    a = torch.randn(256, 256)
    providers = [Provider("fastbert", "fp32", lambda: lambda: a @ a)]
    cpu = torch.device("cpu")
    for asked in (True, False):
        case = Case("train-step", "a", Work(), providers, shares_products=asked)
        (row,) = measure(case, functools.partial(interleaved_ms, repeats=1), cpu).rows
        assert row.matrix_share is None or asked
        assert not asked or (row.matrix_share is not None and row.matrix_share > 0.5)
