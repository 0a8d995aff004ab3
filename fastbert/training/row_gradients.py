"""Gradients of tables of which a step reads few rows: kept in memory that is zero elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# tokens of a step over rows of the table, at most: every micro-batch's rows are appended to a copy
# of those before, which in the end would take more memory than the table
MOST_READ = 0.25


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
        # of an update that was cut short
        self.clear()
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


def embeddings_of(model: nn.Module, weight: Tensor) -> list[nn.Embedding]:
    """The modules that look rows of a weight up."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [module for module in embeddings if module.weight is weight]


@contextlib.contextmanager
def read_sparsely(embeddings: list[nn.Embedding], tokens: int) -> Iterator[None]:
    """Inside, these give sparse gradients where no kernel computes them; afterwards as before.

    Only for a step of few tokens: a sparse gradient holds a row for each.
    """
    before = [module.sparse for module in embeddings]
    for module in embeddings:
        module.sparse = tokens <= module.num_embeddings * MOST_READ
    try:
        yield
    finally:
        for module, sparse in zip(embeddings, before, strict=True):
            module.sparse = sparse
