"""int8 products are exact where numbers lie on their grid, and only the layers are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_config
from torch import nn

from fastbert.int8 import Int8Linear, quantize
from fastbert.models import BertModel
from fastbert.packing import Examples

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.quantized, "linear_dynamic"), reason="this torch has no int8 products"
)


def on_the_grid(linear: nn.Linear) -> nn.Linear:
    """Whole numbers for weights, 127 in every row: its scale is 1."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, linear.weight.shape, generator=generator).float()
    weight[:, 0] = 127
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(torch.arange(float(linear.out_features)))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_are_multiplied_exactly(bias, dtype):
    linear = on_the_grid(nn.Linear(24, 8, bias=bias))
    quantized = Int8Linear(linear)
    top = 127 if quantized.reduce_range else 255
    x = torch.randint(0, top + 1, (5, 24), generator=torch.Generator().manual_seed(1)).float()
    # both ends are there: the activations' scale is 1 and their zero 0
    x[0, 0], x[0, 1] = 0, top
    assert torch.equal(quantized(x.to(dtype)), linear(x.to(dtype).float()).to(dtype))


def test_the_layers_alone_are_replaced():
    model = BertModel.from_config(tiny_config())
    before = copy.deepcopy(model)
    linears = sum(type(m) is nn.Linear for m in model.encoder.layers.modules())
    assert quantize(model) is model
    kinds = [type(module) for module in model.encoder.layers.modules()]
    assert nn.Linear not in kinds and kinds.count(Int8Linear) == linears > 0
    rest = {n: p for n, p in before.state_dict().items() if not n.startswith("encoder.layers")}
    assert rest and all(torch.equal(model.state_dict()[name], p) for name, p in rest.items())
    batch = Examples.from_lists([[5, 6, 7], [8, 9]]).batch([0, 1])
    with torch.no_grad():
        exact, rounded = (m.eval()(batch).last_hidden_state for m in (before, model))
    assert rounded.isfinite().all() and not torch.equal(exact, rounded)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match=r"expected a model of fastbert\.models, got Linear"):
        quantize(nn.Linear(2, 2))
    with torch.device("meta"):
        elsewhere = BertModel(tiny_config())
    with pytest.raises(ValueError, match="the model is on meta"):
        quantize(elsewhere)
