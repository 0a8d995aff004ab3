"""Static gates: what is found now is no worse than committed, and what got worse is named."""

from __future__ import annotations

import copy

import pytest

from fastbert.bench import activations, gates, layer_kernels

COMMITTED = {
    "kernels_a_layer": {"forward": 8, "backward": 19},
    "saved_bytes": {"transformers": 100.0, "fastbert": 60.0},
    "packing_full_percent": {"wiki": 99.9},
    "compiled": {"triton": "3.7.1", "rows": {"a/b/1 bfloat16 sm_90": [64, 1024]}},
}


def changed(**fields):
    found = copy.deepcopy(COMMITTED)
    for name, value in fields.items():
        found[name] = value
    return found


def test_the_same_and_better_pass():
    assert gates.failures(COMMITTED, COMMITTED) == []
    better = changed(
        kernels_a_layer={"forward": 7, "backward": 19},
        saved_bytes={"transformers": 120.0, "fastbert": 50.0},
        packing_full_percent={"wiki": 100.0},
        compiled={"triton": "3.7.1", "rows": {"a/b/1 bfloat16 sm_90": [60, 512]}},
    )
    assert gates.failures(COMMITTED, better) == []


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"kernels_a_layer": {"forward": 9, "backward": 19}},
         "a layer launches 9 kernels forward, 8 committed"),
        ({"saved_bytes": {"fastbert": 61.0}},
         "fastbert: a layer keeps 61 bytes a token, 60 committed"),
        ({"packing_full_percent": {"wiki": 99.8}},
         "packing of wiki: 99.8 % full, 99.9 % committed"),
        ({"compiled": {"triton": "3.7.1", "rows": {"a/b/1 bfloat16 sm_90": [65, 1024]}}},
         "a/b/1 bfloat16 sm_90: 65 registers, 64 committed"),
        ({"compiled": {"triton": "3.7.1", "rows": {"a/b/1 bfloat16 sm_90": [64, 2048]}}},
         "a/b/1 bfloat16 sm_90: 2048 shared bytes, 1024 committed"),
        ({"compiled": {"triton": "3.7.1", "rows": {"new bfloat16 sm_90": [1, 1]}}},
         "new bfloat16 sm_90: not in the table; bench gates --write takes it up"),
    ],
)  # fmt: skip
def test_what_got_worse_is_named(fields, line):
    assert gates.failures(COMMITTED, changed(**fields)) == [line]


def test_another_compilers_registers_are_not_compared():
    other = {"triton": "3.6.0", "rows": {"a/b/1 bfloat16 sm_90": [99, 9999]}}
    assert gates.failures(COMMITTED, changed(compiled=other)) == []


def test_packing_is_as_full_as_committed():
    found = {"packing_full_percent": gates.packing()}
    assert gates.failures(gates.read(), found) == []
    assert min(found["packing_full_percent"].values()) > 99.5


def test_the_committed_bytes_meet_the_goals():
    # test_kernel_activations counts them anew
    committed = gates.read()["saved_bytes"]
    for name, goal in activations.GOALS.items():
        assert committed[name] <= goal * committed["transformers"]


def test_the_committed_kernels_meet_the_goal():
    committed = gates.read()["kernels_a_layer"]
    assert all(committed[way] <= most for way, most in layer_kernels.MOST.items())


def test_compiled_kernels_are_as_lean_as_committed(tmp_path):
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    from fastbert.bench import compile_matrix, kernel_cases

    # one of each kind, on one architecture: `make bench-gates` compiles the quick matrix
    kernels = ("layer_norm_fwd/", "bias_activation_bwd/", "gather_rows/")
    todo = [
        job
        for job in compile_matrix.jobs(kernel_cases.cases(), quick=True)
        if (job.architecture, job.dtype) == ("sm_90", "bfloat16") and job.case.startswith(kernels)
    ]
    assert len(todo) >= len(kernels)
    found = gates.compiled(compile_matrix.run(todo, 1, tmp_path))
    assert gates.failures(gates.read(), {"compiled": found}) == []


def test_every_kernel_of_the_quick_matrix_is_in_the_table():
    pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")
    from fastbert.bench import compile_matrix, kernel_cases

    jobs = compile_matrix.jobs(kernel_cases.cases(), quick=True)
    names = {f"{job.case} {job.dtype} {job.architecture}" for job in jobs}
    assert names == gates.read()["compiled"]["rows"].keys()
