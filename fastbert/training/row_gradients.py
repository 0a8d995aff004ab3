"""Gradients of tables of which a step reads few rows: kept in memory that is zero elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class RowGradients:
    """Makes sparse gradients dense for an update, without clearing a whole table at every step.

    Every optimiser here moves all rows, by their moments, and reads a dense gradient. A table's
    lies in one tensor from step to step; between updates it is zero.
    """

    def __init__(self) -> None:
        self._tables: dict[Tensor, Tensor] = {}
        self._written: list[tuple[Tensor, Tensor]] = []

    def spread(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Give every parameter a dense gradient, until `clear`.

        Args:
            parameters: with sparse, dense or no gradients.

        Returns:
            What the gradients hold but for rows of zeros.
        """
        held = []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                if parameter not in self._tables:
                    self._tables[parameter] = torch.zeros_like(parameter)
                table = self._tables[parameter]
                table.index_copy_(0, rows, values)
                self._written.append((table, rows))
                parameter.grad, gradient = table, values
            held.append(gradient)
        return held

    def clear(self) -> None:
        """After the update: zero what was written."""
        for table, rows in self._written:
            table.index_fill_(0, rows, 0.0)
        self._written.clear()


def read_sparsely(model: nn.Module, weight: Tensor) -> None:
    """Have the embedding of this weight give sparse gradients, where no kernel computes them."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is weight:
            module.sparse = True
