from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import check_operator
from torch.overrides import TorchFunctionMode

from fastbert.kernels import ops

# the first row, the last, one that comes three times, and few enough that some are left out
ROWS = torch.tensor([4, 0, 12, 4, 7, 4])
TOKENS, WIDTH, HIDDEN = 13, 10, 6


def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {"x": normal(TOKENS, WIDTH), "weight": normal(3 * HIDDEN, WIDTH), "bias": normal(18)}


def theirs(x, weight, bias=None):
    selected = torch.zeros(TOKENS, 1, dtype=x.dtype).index_fill(0, ROWS, 1.0)
    projected = F.linear(x, weight, bias)
    return torch.cat([projected[:, :HIDDEN] * selected, projected[:, HIDDEN:]], dim=1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_the_rows_and_gradients_against_the_formula(dtype, has_bias):
    def made(generator):
        drawn = inputs(generator)
        return drawn if has_bias else {name: drawn[name] for name in ("x", "weight")}

    check_operator(
        lambda x, weight, bias=None: ops.selected_qkv(x, weight, bias, ROWS), theirs, made, dtype
    )


def test_other_rows_have_no_query_and_gradients_at_it_go_nowhere():
    drawn = inputs(torch.Generator().manual_seed(0))
    leaves = [tensor.requires_grad_() for tensor in drawn.values()]
    projected = ops.selected_qkv(*leaves, ROWS)
    others = [row for row in range(TOKENS) if row not in ROWS]
    assert (projected[others, :HIDDEN] == 0.0).all() and (projected[ROWS, :HIDDEN] != 0.0).all()
    flowing = torch.zeros_like(projected)
    flowing[others, :HIDDEN] = 1.0
    for gradient in torch.autograd.grad(projected, leaves, flowing):
        assert (gradient == 0.0).all()


def test_queries_are_projected_for_the_rows_alone():
    class Products(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.linear:
                sizes.append((len(args[0]), len(args[1])))
            return function(*args, **(kwargs or {}))

    sizes: list[tuple[int, int]] = []
    drawn = inputs(torch.Generator().manual_seed(0))
    with Products():
        ops.selected_qkv(*drawn.values(), ROWS)
    assert sizes == [(len(ROWS), HIDDEN), (TOKENS, 2 * HIDDEN)]


def test_a_second_derivative():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(generator).values())
    call = lambda *tensors: ops.selected_qkv(*tensors, ROWS)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_autocast_and_shapes_that_do_not_fit():
    x, weight, bias = (t.float() for t in inputs(torch.Generator().manual_seed(0)).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.selected_qkv(x, weight, bias, ROWS).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"selected_qkv: bias must be \[18\], got \[6\]"):
        ops.selected_qkv(x, weight, bias[:6], ROWS)
    with pytest.raises(ValueError, match=r"weight \[3 \* hidden_size, width\], got .* \[17, 10\]"):
        ops.selected_qkv(x, weight[:17], bias, ROWS)
