"""A running mean of the weights, which is smoother than the weights are (Polyak and Juditsky 1992).

Every update moves the mean by a small share towards the weights; the first ones by more, so that
it forgets the random start: decay is at most (1 + n) / (10 + n) after n updates, as in TensorFlow's
ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The mean of a model's parameters.

    Args:
        model: whose.
        decay: what the mean keeps of itself at an update, below 1.

    Attributes:
        weights: by the parameter's name.
        count: scalar fp32, updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.count = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Move towards the weights; not where the step changed nothing. Never asks the device.

        Args:
            skipped: scalar fp32, 1 where the step changed nothing.
        """
        self.count += 1.0 - skipped.reshape(())
        decay = ((1.0 + self.count) / (10.0 + self.count)).clamp(max=self.decay)
        share = (1.0 - decay) * (1.0 - skipped.reshape(()))
        for name, parameter in self._parameters.items():
            self.weights[name].lerp_(parameter, share.to(parameter.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the mean for its weights."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self.weights)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The mean and its counter by name, for a checkpoint."""
        return {**self.weights, "count": self.count}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`.

        Raises:
            ValueError: other names or shapes than the model's.
        """
        own = self.state_tensors()
        if tensors.keys() != own.keys():
            raise ValueError(f"average: {min(tensors.keys() ^ own.keys())} is on one side alone")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"average: {name} has shape {list(tensors[name].shape)}, "
                    f"the parameter has {list(tensor.shape)}"
                )
            tensor.copy_(tensors[name])
