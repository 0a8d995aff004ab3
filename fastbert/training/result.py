"""What one optimiser step reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastbert.models import Targets


@dataclass
class StepResult:
    """What one optimiser step reports; sums stay on the device until somebody reads them.

    Attributes:
        tokens: real ones.
        targets: of every objective.
        sums: over targets, by name.
        slots: tokens that there was room for.
        operations: multiplications and additions of its forward and backward pass.
        waited_s: seconds that it waited for its batches.
    """

    tokens: int
    targets: Targets
    sums: dict[str, Tensor] = field(default_factory=dict)
    slots: int = 0
    operations: float = 0.0
    waited_s: float = 0.0

    def add(self, name: str, value: Tensor | None) -> None:
        """Add a sum over targets."""
        if value is not None:
            self.sums[name] = self.sums[name] + value if name in self.sums else value
