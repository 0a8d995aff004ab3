"""Learning-rate schedules and budgets: pure functions of how much of a run is done."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fastbert.errors import InputError

# share of the run over which warmup-stable-decay falls (Hu et al. 2024, arXiv:2404.06395)
DECAY_SHARE = 0.4


@dataclass(frozen=True)
class Budget:
    """When a run ends: after so many steps or so many minutes, whichever comes first.

    Attributes:
        max_steps: optimiser steps.
        max_minutes: on the run's own clock, which a resumed run continues.
    """

    max_steps: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise InputError("a run needs an end: give --max-steps or --max-minutes")
        for flag, value in (("--max-steps", self.max_steps), ("--max-minutes", self.max_minutes)):
            if value is not None and not value > 0:
                raise InputError(f"{flag} must be more than 0, got {value}")

    def progress(self, step: float, seconds: float) -> float:
        """Share of the run that is done, 0 to 1."""
        shares = [0.0]
        if self.max_steps is not None:
            shares.append(step / self.max_steps)
        if self.max_minutes is not None:
            shares.append(seconds / (60.0 * self.max_minutes))
        return min(max(shares), 1.0)


_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[mhdKMB])")
_MINUTES = {"m": 1.0, "h": 60.0, "d": 24 * 60.0}
_TOKENS = {"K": 1e3, "M": 1e6, "B": 1e9}


def parse_budget(text: str, tokens_a_step: int) -> Budget:
    """Read "10m", "4h" or "2d" of time, or "500K", "30M" or "3B" tokens.

    Args:
        text: number and unit; m is minutes, M is million tokens.
        tokens_a_step: what tokens are counted in.

    Raises:
        InputError: anything else.
    """
    found = _BUDGET.fullmatch(text)
    if found is None or not float(found["number"]) > 0:
        raise InputError(
            f"--budget must be time (10m, 4h, 2d) or tokens (500K, 30M, 3B), got {text!r}"
        )
    number, unit = float(found["number"]), found["unit"]
    if unit in _MINUTES:
        return Budget(max_minutes=number * _MINUTES[unit])
    return Budget(max_steps=max(math.ceil(number * _TOKENS[unit] / tokens_a_step), 1))


def constant(progress: float, warmup: float) -> float:
    """Up over `warmup`, then 1."""
    return _warm(progress, warmup)


def linear(progress: float, warmup: float) -> float:
    """Up over `warmup`, then straight down to 0 (Devlin et al. 2018)."""
    return min(_warm(progress, warmup), _rest(progress, warmup))


def cosine(progress: float, warmup: float) -> float:
    """Up over `warmup`, then half a cosine down to 0 (Loshchilov and Hutter 2016)."""
    if progress < warmup:
        return _warm(progress, warmup)
    return 0.5 * (1.0 + math.cos(math.pi * (1.0 - _rest(progress, warmup))))


def warmup_stable_decay(progress: float, warmup: float) -> float:
    """Up over `warmup`, flat, then straight down to 0 over the last 40 % of the run."""
    return min(_warm(progress, warmup), (1.0 - progress) / DECAY_SHARE, 1.0)


SCHEDULES = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": warmup_stable_decay,
}


def learning_rate_factor(schedule: str, progress: float, warmup: float) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        schedule: a name in SCHEDULES.
        progress: share of the run that is done, 0 to 1; of steps, or of time.
        warmup: share of the run over which the rate rises from 0.
    """
    return SCHEDULES[schedule](progress, warmup)


def _warm(progress: float, warmup: float) -> float:
    return min(progress / warmup, 1.0) if warmup > 0.0 else 1.0


def _rest(progress: float, warmup: float) -> float:
    return (1.0 - progress) / (1.0 - warmup)
