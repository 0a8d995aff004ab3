"""What every configuration of a run refuses, whatever its fields mean."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from fastbert.errors import InputError

MOST_SEED = 2**63 - 1


def check_fields(config: Any) -> None:
    """Refuse numbers that are not finite, and seeds that no generator takes.

    Raises:
        InputError: names the flag.
    """
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} must be a finite number, got {value}")
        if field.name == "seed" and not 0 <= value <= MOST_SEED:
            raise InputError(f"{flag} must be 0 to {MOST_SEED}, got {value}")
