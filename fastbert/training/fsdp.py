"""A model in shards: every rank holds a part of each parameter, gradient and moment (FSDP2).

A layer is gathered while it is computed, forward and backward; the rest of the model stays gathered
for the length of a step. Gradients are summed into shards once an optimiser step (Zhao et al. 2023,
arXiv:2304.11277; torch's `fully_shard`).
"""

from __future__ import annotations

import torch
from torch import nn

from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining, Model
from fastbert.training.parallel import Ranks
from fastbert.training.shards import whole


def shard_model(model: Model, ranks: Ranks, dtype: torch.dtype) -> None:
    """Deal a model's parameters out over the ranks, in place; optimisers are made after it.

    Args:
        model: whole and the same on every rank, where it is to be computed.
        ranks: that share it.
        dtype: of matrix products: layers are gathered in it, gradients summed in fp32.

    Raises:
        InputError: layers that share weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    refuse_shared_layers(model)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.count,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # losses are divided by the targets of all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def refuse_shared_layers(model: Model) -> None:
    """Raise InputError for a model that uses a layer's weights more than once (ALBERT)."""
    if len(model.encoder.layers) < model.config.num_hidden_layers:
        raise InputError(
            "--parallel fsdp: a model whose layers share weights cannot be sharded by layers; "
            "take --parallel ddp"
        )


def in_one_piece(
    model: BertForPreTraining | BertForMaskedLM,
) -> BertForPreTraining | BertForMaskedLM:
    """The same model with whole parameters, on the same device; every rank must ask for it."""
    tensors = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    device = next(iter(tensors.values())).device
    plain = type(model)(model.config)
    plain.load_state_dict(tensors)
    plain.loss_weights = model.loss_weights
    return plain.to(device).eval()


def synchronise(model: nn.Module, now: bool) -> bool:
    """Whether the coming backward pass sums gradients over ranks; False for a model in one piece.

    Args:
        model: sharded or not.
        now: whether it is the last one of an optimiser step.

    Returns:
        Whether the model is sharded: then all ranks must compute as often, empty batches too.
    """
    if not hasattr(model, "set_requires_gradient_sync"):
        return False
    model.set_requires_gradient_sync(now)  # type: ignore[operator]
    return True
