"""What one optimiser step reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastbert.models import Targets


@dataclass
class StepResult:
    """What one optimiser step reports; sums stay on the device until somebody reads them."""

    tokens: int
    targets: Targets
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor | None) -> None:
        """Add a sum over targets."""
        if value is not None:
            self.sums[name] = self.sums[name] + value if name in self.sums else value
