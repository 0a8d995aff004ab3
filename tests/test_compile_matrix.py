"""What the compile matrix gates, on kernels small enough to compile in a second."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton", reason="triton comes with the test extra, on Linux")

from fastbert.bench import compile_matrix
from fastbert.bench.compile_matrix import ARCHITECTURES, Row
from fastbert.bench.kernel_cases import cases
from fastbert.kernels.attention_launch import ROOMY


@pytest.fixture(scope="module")
def quick():
    return compile_matrix.jobs(cases(), quick=True)


def job(quick, case, architecture, dtype="bfloat16"):
    return next(
        j
        for j in quick
        if (j.architecture, j.dtype) == (architecture, dtype) and j.case.startswith(case)
    )


def test_the_quick_part_has_every_kernel_everywhere(quick):
    assert {j.architecture for j in quick} == {a.name for a in ARCHITECTURES}
    functions = {j.function for j in compile_matrix.jobs(cases(), quick=False)}
    for architecture in ARCHITECTURES:
        assert {j.function for j in quick if j.architecture == architecture.name} == functions
    assert {j.dtype for j in quick if j.architecture == "sm_90"} >= {
        "float32",
        "float16",
        "bfloat16",
    }


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_a_matrix_kernel_compiles_to_tensor_cores(quick, architecture, tmp_path):
    wanted = job(quick, "linear_activation", architecture)
    (row,) = compile_matrix.run([wanted], 1, tmp_path)
    expected = next(a.instruction for a in ARCHITECTURES if a.name == architecture)
    assert row.instruction == expected
    assert row.failures == () and row.registers > 0 and row.spill_bytes == 0
    # the second time it comes from the cache
    (again,) = compile_matrix.run([wanted], 1, tmp_path)
    assert again == row


def test_spills_are_seen(quick, tmp_path):
    # one warp cannot hold four rows and their gradients
    wanted = job(quick, "layer_norm_bwd", "sm_90")
    large = dataclasses.replace(wanted, num_warps=1, constants={**wanted.constants, "ROWS": 4})
    (row,) = compile_matrix.run([large], 1, tmp_path)
    assert row.spill_bytes > 0
    assert any("spills" in failure for failure in row.failures)


def test_too_much_shared_memory_is_seen(quick, tmp_path):
    wanted = job(quick, "linear_activation", "sm_86")
    constants = {**wanted.constants, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    large = dataclasses.replace(wanted, constants=constants, num_stages=5, num_warps=8)
    (row,) = compile_matrix.run([large], 1, tmp_path)
    assert any("shared memory" in failure and "limit 99" in failure for failure in row.failures)


def test_a_missing_instruction_is_seen(quick):
    wanted = job(quick, "linear_activation", "sm_90")
    row = Row(wanted.case, "bfloat16", "sm_90", 4, 2, 64, 0, 1024, "", 1, ())
    assert compile_matrix._judged(row, wanted).failures == ("no wgmma instruction",)
    single = dataclasses.replace(row, dtype="float32")
    assert compile_matrix._judged(single, wanted).failures == ()


def test_what_does_not_compile_is_a_failure(quick, tmp_path):
    wanted = job(quick, "linear_activation", "sm_90")
    broken = dataclasses.replace(wanted, constants={**wanted.constants, "BLOCK_K": 3})
    (row,) = compile_matrix.run([broken], 1, tmp_path)
    assert row.failures[0].startswith("does not compile: ")
    assert "does not compile" in compile_matrix.table([row])


def test_the_key_follows_source_and_launch(quick):
    wanted = job(quick, "linear_activation", "sm_90")
    assert compile_matrix._key(wanted) != compile_matrix._key(
        dataclasses.replace(wanted, num_warps=8)
    )
    assert compile_matrix._key(wanted) == compile_matrix._key(dataclasses.replace(wanted, case="x"))


def test_the_quick_part_passes(quick, request):
    # a minute or two on two processors, and seconds where nothing changed since
    cache = request.config.cache.mkdir("compile_matrix")
    rows = list(compile_matrix.run(quick, cache=cache))
    assert len(rows) == len(quick)
    assert not any(row.failures for row in rows), compile_matrix.table(rows)
    largest = max(row.shared_bytes for row in rows if row.architecture not in ROOMY)
    assert largest <= compile_matrix.SAFE_SHARED_KIB * compile_matrix.KIB


def test_products_are_counted_region_by_region():
    ttir = """
    %1 = tt.dot %a, %b, %c : tensor<64x64xbf16> loc(#loc1)
    %2 = scf.for %i = %c0 to %n step %c1 iter_args(%x = %1) -> (tensor<64x64xf32>)  : i32 {
      %3 = tt.dot %a, %b, %x : tensor<64x64xbf16> loc(#loc2)
      %4 = tt.dot %a, %b, %3 {inputPrecision = 2 : i32} : tensor<64x64xbf16>
      scf.yield %4 : tensor<64x64xf32> loc(#loc3)
    } loc(#loc4)
    %5 = tt.dot %a, %b, %2 : tensor<64x64xbf16> loc(#loc5)
    """
    assert compile_matrix.products_in(ttir) == 2


def test_a_product_too_many_is_seen(quick):
    wanted = job(quick, "attention_bwd_owned_64", "sm_90")
    assert wanted.products == 5
    row = Row(wanted.case, "bfloat16", "sm_90", 4, 1, 64, 0, 1024, "wgmma", 7, ())
    assert compile_matrix._judged(row, wanted).failures == ("7 matrix products, 5 are enough",)
