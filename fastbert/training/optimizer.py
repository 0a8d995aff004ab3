"""Which optimiser moves which parameter, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.errors import InputError
from fastbert.training.lamb import Lamb
from fastbert.training.loss_scale import LossScale
from fastbert.training.muon import Muon
from fastbert.training.row_gradients import RowGradients
from fastbert.training.shards import whole
from fastbert.training.stable_adamw import StableAdamW
from fastbert.training.weight_average import WeightAverage

OPTIMIZERS = ("adamw", "muon", "lamb", "stable-adamw")
_LOSS_SCALE, _AVERAGE = "loss_scale", "average:"
# an embedding's rows and a classifier's outputs are no map between hidden states
_NOT_HIDDEN = (
    "embeddings.",
    "next_sentence.",
    "classifier.",
    "span.",
    "head.",
    "detection.projection.",
)


class Update(NamedTuple):
    """What an update says of its gradients.

    Attributes:
        skipped: scalar fp32, 1 where they were not finite, so that nothing was changed.
        gradient_norm: scalar, their norm before clipping.
    """

    skipped: Tensor
    gradient_norm: Tensor


class Optimizers:
    """One or two torch optimisers that together cover every parameter exactly once.

    "adamw" is AdamW for all (Loshchilov and Hutter 2017). "muon" moves the matrices between hidden
    states (of layers, pooler and masked-LM head) by Muon (Jordan et al. 2024), its update scaled to
    the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), and the rest by AdamW. Biases and norms
    have no weight decay.

    Learning rates lie beside the parameters, and a step whose gradients are not finite changes
    nothing: both without asking the device.

    Args:
        model: its parameters are covered.
        name: "adamw", "muon", or "lamb" or "stable-adamw" for all.
        learning_rate: AdamW's peak.
        muon_learning_rate: Muon's peak.
        weight_decay: decoupled; of matrices and embeddings.
        beta2: of AdamW.
        rate_factor: of a parameter's name: what its peak learning rate is multiplied by; None
            for 1 throughout.

    Attributes:
        average: a running mean of the weights, for runs that keep one.
        loss_scale: by which losses were multiplied before their backward pass; None for 1.

    Raises:
        InputError: an unknown name.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        learning_rate: float,
        muon_learning_rate: float = 0.0,
        weight_decay: float = 0.01,
        beta2: float = 0.98,
        rate_factor: Callable[[str], float] | None = None,
    ) -> None:
        if name not in OPTIMIZERS:
            raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
        self.names: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}
        matrices = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and not any(part in name for part in _NOT_HIDDEN)
        ]
        by_muon = set(matrices) if name == "muon" else set()
        by_adamw = [p for p in model.parameters() if p not in by_muon]
        groups = [
            group
            for chosen, decay in (
                ([p for p in by_adamw if p.ndim > 1], weight_decay),
                ([p for p in by_adamw if p.ndim <= 1], 0.0),
            )
            for group in self._by_rate(chosen, learning_rate, decay, rate_factor)
        ]
        device = next(model.parameters()).device
        self.optimizers: list[torch.optim.Optimizer] = [
            _for_vectors(name, groups, learning_rate, (0.9, beta2), device)
        ]
        if by_muon:
            of_muon = self._by_rate(matrices, muon_learning_rate, weight_decay, rate_factor)
            self.optimizers.append(Muon(of_muon, muon_learning_rate, weight_decay))
        self._assert_covered(model)
        self.loss_scale: LossScale | None = None
        self.average: WeightAverage | None = None
        self._groups = [group for o in self.optimizers for group in o.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        self._rates = torch.zeros(len(self._peaks), device=device)
        for group, rate in zip(self._groups, self._rates.unbind(), strict=True):
            group["lr"] = rate
        self._factor = 0.0
        self._rows = RowGradients()

    def _by_rate(
        self,
        parameters: list[nn.Parameter],
        peak: float,
        weight_decay: float,
        rate_factor: Callable[[str], float] | None,
    ) -> list[dict[str, Any]]:
        """Groups of one learning rate each."""
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            factor = rate_factor(self.names[parameter]) if rate_factor else 1.0
            groups.setdefault(factor, []).append(parameter)
        return [
            {"params": chosen, "lr": peak * factor, "weight_decay": weight_decay}
            for factor, chosen in (groups or {1.0: []}).items()
        ]

    def step(self, factor: float, clip_norm: float = 0.0) -> Update:
        """`set_rates` and `update`."""
        self.set_rates(factor)
        return self.update(clip_norm)

    def set_rates(self, factor: float) -> None:
        """Take `factor` times the peak learning rates from now on."""
        self._factor = factor
        rates = torch.tensor([peak * factor for peak in self._peaks])
        if self._rates.device.type == "cuda":
            rates = rates.pin_memory()
        self._rates.copy_(rates, non_blocking=True)

    def update(self, clip_norm: float = 0.0) -> Update:
        """One update; gradients are dropped after it. Never asks the device.

        Args:
            clip_norm: norm of all gradients above which they are scaled down; 0 for never.
        """
        norm = whole(nn.utils.get_total_norm(self._rows.spread(self.names)))
        found_inf = (~norm.isfinite()).to(torch.float32)
        divisor = None
        if self.loss_scale is not None:
            divisor = self.loss_scale.scale.clone()
            norm = norm / divisor
        if clip_norm:
            excess = ((norm + 1e-6) / clip_norm).clamp(min=1.0).to(torch.float32)
            divisor = excess if divisor is None else divisor * excess
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._rows.clear()
        if self.loss_scale is not None:
            self.loss_scale.update(found_inf)
        if self.average is not None:
            self.average.update(found_inf)
        return Update(found_inf, norm)

    def learning_rate(self) -> float:
        """AdamW's current one."""
        return float(self._peaks[0] * self._factor)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and counters by parameter, as "parameter/entry"; the loss scale likewise, and
        the running mean of the weights as "average:parameter"."""
        tensors = {
            f"{self.names[parameter]}/{entry}": value
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for entry, value in entries.items()
        }
        scale = {} if self.loss_scale is None else self.loss_scale.state_tensors()
        mean = {} if self.average is None else self.average.state_tensors()
        return (
            tensors
            | {f"{_LOSS_SCALE}/{name}": value for name, value in scale.items()}
            | {f"{_AVERAGE}{name}": value for name, value in mean.items()}
        )

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises:
            ValueError: a tensor belongs to no parameter, or has another shape than its own.
        """
        mean = {key: value for key, value in tensors.items() if key.startswith(_AVERAGE)}
        tensors = {key: value for key, value in tensors.items() if key not in mean}
        if self.average is not None:
            self.average.load_state_tensors(
                {key.removeprefix(_AVERAGE): value for key, value in mean.items()}
            )
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
        if _LOSS_SCALE in entries:
            self.loss_scale = LossScale(self._rates.device)
            self.loss_scale.load_state_tensors(entries.pop(_LOSS_SCALE))
        unknown = entries.keys() - set(self.names.values())
        if unknown:
            raise ValueError(f"{min(unknown)} is no parameter of the model")
        for optimizer in self.optimizers:
            for parameter in _parameters(optimizer):
                name = self.names[parameter]
                for entry, value in entries.get(name, {}).items():
                    # counters are scalars
                    if value.ndim and value.shape != parameter.shape:
                        raise ValueError(
                            f"{name}/{entry} has shape {list(value.shape)}, "
                            f"the parameter has {list(parameter.shape)}"
                        )
                    optimizer.state[parameter][entry] = value.to(parameter.device)

    def _assert_covered(self, model: nn.Module) -> None:
        covered = [p for optimizer in self.optimizers for p in _parameters(optimizer)]
        assert len(covered) == len(set(covered)), "a parameter is in two groups"
        assert set(covered) == set(model.parameters()), "a parameter is in no group"


def _for_vectors(
    name: str,
    groups: list[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float],
    device: torch.device,
) -> torch.optim.Optimizer:
    """What moves everything, or with Muon what Muon does not."""
    if name == "lamb":
        return Lamb(groups, lr=learning_rate, betas=betas)
    if name == "stable-adamw":
        return StableAdamW(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=betas,
        eps=1e-8,
        fused=True,
        capturable=device.type == "cuda",
    )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
