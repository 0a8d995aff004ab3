"""The error rule for two programs that claim the same numbers: no speed-up on a red check.

Pooled over batches, for every tensor: the root mean square error of ours against fp64 is at most
1.25 times the peer's, the largest at most 2 times, each plus 2 eps times the fp64 values' size. eps
is that of the dtype in which products are made: under autocast a gradient is made in bf16 and only
then widened to the fp32 of its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RMS_FACTOR, MAX_FACTOR, EPS_FACTOR = 1.25, 2.0, 2.0


@dataclass
class _Errors:
    """Of one tensor: those of ours, those of the peer, and the fp64 values themselves."""

    ours: list[Tensor] = field(default_factory=list)
    theirs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Parity:
    """Gathers tensors by name over batches; `failures` judges them together.

    Args:
        dtype: in which both sides make their products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._slack = EPS_FACTOR * torch.finfo(dtype).eps
        self._errors: dict[str, _Errors] = {}

    def add(
        self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
    ) -> None:
        """One batch.

        Args:
            ours, theirs: by name.
            oracle: the same in fp64.

        Raises:
            ValueError: names or shapes differ, or the oracle is not fp64.
        """
        if not ours.keys() == theirs.keys() == oracle.keys():
            raise ValueError("parity: the two sides and the oracle name different tensors")
        for name, truth in oracle.items():
            if truth.dtype != torch.float64 or not (
                ours[name].shape == theirs[name].shape == truth.shape
            ):
                raise ValueError(f"parity: {name}: the oracle must be fp64 and of the same shape")
            errors = self._errors.setdefault(name, _Errors())
            errors.ours.append(_error(ours[name], truth))
            errors.theirs.append(_error(theirs[name], truth))
            errors.values.append(truth.detach().abs().flatten().cpu())

    def failures(self) -> list[str]:
        """A line for every tensor outside the rule."""
        # written so that NaN fails
        return [
            f"{name}: {measure} error {ours:.2e}, allowed {bound:.2e}"
            for name, errors in self._errors.items()
            for measure, ours, bound in self._bounds(errors)
            if not ours <= bound
        ]

    def worst(self) -> float:
        """The largest error of ours as a share of what is allowed, over all tensors."""
        bounds = [bound for errors in self._errors.values() for bound in self._bounds(errors)]
        return max(_share(ours, bound) for _, ours, bound in bounds)

    def worst_tensor(self) -> tuple[str, float, float, float]:
        """The tensor nearest to its bound: name, rms errors of ours and the peer's, share."""
        shares = {
            name: max(_share(ours, bound) for _, ours, bound in self._bounds(errors))
            for name, errors in self._errors.items()
        }
        name = max(shares, key=lambda key: math.inf if math.isnan(shares[key]) else shares[key])
        errors = self._errors[name]
        return name, _rms(errors.ours), _rms(errors.theirs), shares[name]

    def beside_peer(self) -> list[float]:
        """Root mean square error of ours over the peer's, a figure a tensor, ascending."""
        pairs = [(_rms(e.ours), _rms(e.theirs)) for e in self._errors.values()]
        return sorted(_share(ours, theirs) for ours, theirs in pairs)

    def __len__(self) -> int:
        return len(self._errors)

    def _bounds(self, errors: _Errors) -> list[tuple[str, float, float]]:
        return [
            (
                measure,
                of(errors.ours),
                factor * of(errors.theirs) + self._slack * of(errors.values),
            )
            for measure, factor, of in (("rms", RMS_FACTOR, _rms), ("max", MAX_FACTOR, _largest))
        ]


def _error(value: Tensor, truth: Tensor) -> Tensor:
    return (value.detach().double() - truth.detach()).abs().flatten().cpu()


def _share(error: float, whole: float) -> float:
    if whole:
        return error / whole
    return math.inf if error else 0.0


def _rms(parts: list[Tensor]) -> float:
    joined = torch.cat(parts)
    return math.sqrt(float(joined.square().mean())) if len(joined) else 0.0


def _largest(parts: list[Tensor]) -> float:
    joined = torch.cat(parts)
    return float(joined.max()) if len(joined) else 0.0
