from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_harness import DEVICE, DTYPES, by, few_examples, normal, runs_kernels
from oracle import check_operator, poison
from torch import Tensor

from fastbert.kernels import launch, ops
from fastbert.kernels.launch import Launch
from fastbert.kernels.ops import Layout, Rng
from fastbert.kernels.philox import exact_mask

pytestmark = runs_kernels

RNG = Rng(seed=5, step=2, layer=0, site=0, exact=True)
WORDS, POSITIONS, SEGMENTS = 23, 17, 2


def ids(tokens: int, *, same: bool = False, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (tokens,), generator=generator)
    return {
        "input_ids": (words * 0 + 7 if same else words).to(DEVICE),
        "position_ids": (torch.arange(tokens) % POSITIONS).to(DEVICE),
        "token_type_ids": (torch.arange(tokens) % 5 // 3).to(DEVICE),
    }


def inputs(width: int):
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "word_weight": normal(generator, WORDS, width),
            "position_weight": normal(generator, POSITIONS, width),
            "token_type_weight": normal(generator, SEGMENTS, width),
            "norm_weight": 1 + normal(generator, width) / 8,
            "norm_bias": normal(generator, width),
        }

    return make


def check(tokens, width, dtype, dropout_p=0.1, **options):
    constants = {**ids(tokens), "dropout_p": dropout_p, "rng": RNG, **options}
    with poison():
        check_operator(
            by("triton", ops.embedding, **constants),
            by("reference", ops.embedding, **constants),
            inputs(width),
            dtype,
            device=DEVICE,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_dtype(dropout_p, dtype):
    check(19, 40, dtype, dropout_p)


@pytest.mark.parametrize("width", [32, 33, 384, 768])
def test_widths(width):
    check(3, width, torch.float32)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_rows_too_wide_for_registers_are_added_up_in_memory(dropout_p, monkeypatch):
    # some programs walk several rows, some one
    monkeypatch.setattr(launch, "ASSUMED_PROCESSORS", 1)
    width = launch.HELD_WIDTH + 8
    check(5, width, torch.float32, dropout_p)


@few_examples
@given(tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 65]), width=st.integers(32, 80))
def test_any_shape(tokens, width):
    check(tokens, width, torch.float32)


def test_a_word_in_every_place():
    check(70, 40, torch.float32, **ids(70, same=True))


def tailed(tokens: int, capacity: int) -> Layout:
    bounds = torch.tensor([0, 3, tokens, tokens, tokens], dtype=torch.int32)
    return Layout(bounds.to(DEVICE), capacity, capacity)


def run(made: dict[str, Tensor], seed: int = 1, flow: Tensor | None = None, **options):
    leaves = inputs(40)(torch.Generator().manual_seed(seed))
    leaves = {name: t.float().to(DEVICE).requires_grad_() for name, t in leaves.items()}
    with ops.use_backend("triton"):
        y = ops.embedding(**made, **leaves, **{"dropout_p": 0.1, "rng": RNG, **options})
    y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y) if flow is None else flow)
    return [y.detach(), *(t.grad for t in leaves.values())]


@pytest.mark.parametrize("real", [0, 1, 13, 29])
def test_the_tail_is_zero_and_may_be_anything(real):
    """Like the same tokens without a tail, whatever ids and gradients the tail holds."""
    made = ids(29)
    flow = torch.randn(29, 40, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    short = {name: column[:real] for name, column in made.items()}
    expected = run(short, flow=flow[:real])
    for column in made.values():
        column[real:] = 10**9
    flow[real:] = math.nan
    with poison():
        found = run(made, flow=flow, layout=tailed(max(real, 3), 29) if real >= 3 else small(real))
    assert (found[0][real:] == 0).all()
    assert torch.equal(found[0][:real], expected[0])
    # the norm's parameters are summed by programs, which share rows otherwise
    for mine, theirs in zip(found[1:4], expected[1:4], strict=True):
        assert torch.equal(mine, theirs)
    assert all(t.isfinite().all() for t in found)


def small(real: int) -> Layout:
    return Layout(torch.tensor([0, real], dtype=torch.int32, device=DEVICE), 29, 29)


def test_the_reference_has_the_same_tail():
    constants = {**ids(29), "layout": tailed(13, 29)}
    check(29, 40, torch.float32, **constants)


def test_a_repeat_is_the_same_bit_for_bit():
    first, second = run(ids(50)), run(ids(50))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_are_independent():
    made = ids(20)
    first = run(made)[0]
    made["input_ids"][4] = (made["input_ids"][4] + 1) % WORDS
    second = run(made)[0]
    same = (first == second).all(dim=1)
    assert same.sum() == 19 and not same[4]


@pytest.mark.parametrize("name, size", [("input_ids", WORDS), ("position_ids", POSITIONS)])
@pytest.mark.parametrize("wrong", [-1, 0])
def test_an_id_that_no_table_has_makes_its_row_nan(name, size, wrong):
    made = ids(20)
    made[name][4] = wrong if wrong < 0 else size
    y, *gradients = run(made, dropout_p=0.0)
    assert y[4].isnan().all() and y[[0, 3, 5, 19]].isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_dropped_elements_are_those_of_the_twin():
    made = inputs(40)(torch.Generator().manual_seed(1))
    tables = {name: t.float().to(DEVICE) for name, t in made.items()}
    with ops.use_backend("triton"):
        plain = ops.embedding(**ids(6), **tables)
        dropped = ops.embedding(**ids(6), **tables, dropout_p=0.4, rng=RNG)
    mask = exact_mask((6, 40), 0.4, RNG).to(DEVICE)
    assert torch.equal(dropped == 0, mask == 0)
    assert torch.equal(dropped, plain * mask)


def test_masks_follow_the_coordinates_of_the_rows():
    rows = torch.tensor([3, 1, 4], dtype=torch.int32, device=DEVICE)
    rng = RNG.rows(rows + 10, rows)
    made = inputs(40)(torch.Generator().manual_seed(1))
    tables = {name: t.float().to(DEVICE) for name, t in made.items()}
    with ops.use_backend("triton"):
        dropped = ops.embedding(**ids(3), **tables, dropout_p=0.4, rng=rng)
    assert torch.equal(dropped == 0, exact_mask((3, 40), 0.4, rng).to(DEVICE) == 0)


def test_tables_may_be_wider_than_what_comes_out():
    leaves = inputs(40)(torch.Generator().manual_seed(1))
    leaves = {name: t.float().to(DEVICE).requires_grad_() for name, t in leaves.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = ops.embedding(**ids(9), **leaves)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


def summed(rows: Tensor, keys: Tensor, limit: int) -> Tensor:
    """In small blocks, so that short streams have runs across many."""
    from fastbert.kernels.keyed_sum import sum_by_key

    small_runs, small_joins = (Launch(rows=size, columns=32, num_warps=1) for size in (4, 2))
    with launch.trying("run_sums", small_runs), launch.trying("join_runs", small_joins):
        return sum_by_key(rows, keys, limit)


@few_examples
@given(
    keys=st.lists(st.one_of(st.just(2), st.integers(0, 9)), min_size=1, max_size=60),
    repeats=st.sampled_from([1, 3]),
)
def test_sums_by_key_are_exact(keys, repeats):
    """Whole numbers, so that any order gives the same sums."""
    tokens = -(-len(keys) // repeats)
    keys = (keys * repeats)[: tokens * repeats]
    rows = torch.arange(tokens * 40, device=DEVICE).view(tokens, 40).float() % 97
    column = torch.tensor(keys, dtype=torch.int32, device=DEVICE)
    with poison():
        found = summed(rows, column, 8)
    expected = torch.zeros(10, 40, device=DEVICE)
    expected.index_add_(0, column.long(), rows.repeat(repeats, 1))
    assert torch.equal(found, expected[:8])


@pytest.mark.parametrize("entries", [1, 3, 4, 5, 7, 8, 9, 40])
@pytest.mark.parametrize("keys", [[0], [1, 0], [0, 0, 0, 0, 0, 1], [9]])
def test_runs_that_end_at_block_edges(keys, entries):
    column = torch.tensor((keys * entries)[:entries], dtype=torch.int32, device=DEVICE)
    found = summed(torch.ones(entries, 33, device=DEVICE), column, 3)
    counts = torch.bincount(column.long(), minlength=10)[:3].float()
    assert torch.equal(found, counts[:, None].expand(3, 33))


LEAVES = ("word_weight", "position_weight", "token_type_weight", "norm_weight", "norm_bias")


def leaves() -> dict[str, Tensor]:
    made = inputs(40)(torch.Generator().manual_seed(1))
    return {name: made[name].float().to(DEVICE).requires_grad_() for name in LEAVES}


def test_compiled_in_one_graph_with_the_same_results():
    made, layout, rng = ids(29), tailed(13, 29), RNG.on(DEVICE)

    def call(**tables):
        return ops.embedding(**made, **tables, layout=layout, dropout_p=0.1, rng=rng)

    results = []
    torch._dynamo.reset()
    for operator in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        tables = leaves()
        y = operator(**tables)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in tables.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    from fastbert.kernels import autograd_embedding as autograd

    parameters = [t.detach() for t in leaves().values()]
    columns = list(ids(9).values())
    bounds = torch.tensor([0, 5, 7], dtype=torch.int32, device=DEVICE)
    nothing = (None, None, None, 0, 0, 0.0)
    drawn = (RNG.device_state(torch.device(DEVICE)), None, None, 1, 2, 0.1)
    _, mean, rstd = autograd.embedding_fwd(
        *parameters, *columns, None, *nothing, 1e-12, torch.float32, True
    )
    dy = torch.randn(9, 40, device=DEVICE)
    calls = [
        (autograd.embedding_fwd,
         (*parameters, *columns, bounds, *drawn, 1e-12, torch.bfloat16, True)),
        (autograd.embedding_fwd,
         (*parameters, *columns, None, *nothing, 1e-12, torch.float32, False)),
        (autograd.embedding_bwd, (dy, *parameters[:4], *columns, bounds, mean, rstd, *drawn)),
        (autograd.embedding_bwd, (dy, *parameters[:4], *columns, None, mean, rstd, *nothing)),
    ]  # fmt: skip
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments)


def test_a_second_derivative_is_refused_by_name():
    tables = leaves()
    y = ops.embedding(**ids(9), **tables)
    with pytest.raises(RuntimeError, match=r"embedding: .*no second derivative .*use_backend"):
        torch.autograd.grad(y.sum(), tables["word_weight"], create_graph=True)


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert ops.embedding(**ids(9), **leaves()).grad_fn is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position_weight": lambda t: t[:, :3]}, r"position_weight must be \[17, 40\], got"),
        ({"norm_bias": lambda t: t[:3]}, r"norm_bias must be \[40\], got \[3\]"),
        ({"word_weight": lambda t: t.double()}, "word_weight must be float32, float16 or"),
    ],
)
def test_bad_input(change, message):
    tables = {name: t.detach() for name, t in leaves().items()}
    for name, spoil in change.items():
        tables[name] = spoil(tables[name])
    with pytest.raises(ValueError, match=f"^embedding: {message}"):
        ops.embedding(**ids(9), **tables)


def test_a_layout_for_other_tokens():
    with pytest.raises(ValueError, match="embedding: layout is for 29 tokens, got 9"):
        ops.embedding(**ids(9), **leaves(), layout=tailed(13, 29))
