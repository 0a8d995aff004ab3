"""Which optimiser moves which parameter, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastbert.errors import InputError

OPTIMIZERS = ("adamw", "muon")
# an embedding's rows and a classifier's outputs are no map between hidden states
_NOT_HIDDEN = ("embeddings.", "next_sentence.", "classifier.")


class Optimizers:
    """One or two torch optimisers that together cover every parameter exactly once.

    "adamw" is AdamW for all (Loshchilov and Hutter 2017). "muon" moves the matrices between hidden
    states (of layers, pooler and masked-LM head) by Muon (Jordan et al. 2024), its update scaled to
    the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), and the rest by AdamW. Biases and norms
    have no weight decay.

    Args:
        model: its parameters are covered.
        name: "adamw" or "muon".
        learning_rate: AdamW's peak.
        muon_learning_rate: Muon's peak.
        weight_decay: decoupled; of matrices and embeddings.
        beta2: of AdamW.

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
            {"params": [p for p in by_adamw if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in by_adamw if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), eps=1e-8, fused=True)
        ]
        if by_muon:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=muon_learning_rate,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._assert_covered(model)
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak learning rates; gradients are dropped after it."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def learning_rate(self) -> float:
        """AdamW's current one."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and counters by parameter, as "parameter/entry"."""
        return {
            f"{self.names[parameter]}/{entry}": value
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            for entry, value in entries.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises:
            ValueError: a tensor belongs to no parameter, or has another shape than its own.
        """
        entries: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            entries.setdefault(name, {})[entry] = value
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


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
