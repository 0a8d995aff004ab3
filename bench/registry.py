"""Cases and who computes them: one way to measure, whatever the suite.

1. A provider that cannot run here is a row that says why, with the line that installs it.
2. Parity comes before timing: a provider outside the error rule is refused and gets no figure.
3. The others take their steps in turn, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastbert.bench.ceilings import Ceilings
from fastbert.bench.matrix_share import matrix_share
from fastbert.bench.memory import step_mib
from fastbert.bench.parity import Parity
from fastbert.bench.providers import missing
from fastbert.bench.timing import Spread, Step, speedup, spread
from fastbert.errors import InputError

OURS = "fastbert"
MEASURED, SKIPPED, REFUSED, FAILED = "measured", "skipped", "refused", "failed"

# steps by name -> milliseconds of every round by name
Timer = Callable[[Mapping[str, Step]], dict[str, list[float]]]


@dataclass(frozen=True)
class Work:
    """What one step does, the same for whoever does it.

    Attributes:
        real_tokens: padding does not count.
        padded_tokens: that a padded batch of the same sequences holds; 0 where none is padded.
        operations: floating-point operations of the real tokens.
        moved_bytes: the least that must be moved.
    """

    real_tokens: int = 0
    padded_tokens: int = 0
    operations: float = 0.0
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Provider:
    """One program in one dtype.

    Attributes:
        name, dtype: together unique within a case.
        make: loads what is needed and returns the step.
        check: judges its numbers; None for the side that others are held to.
        needs: names of `fastbert.bench.providers`.
        figures: of accuracy; asked once the steps are timed, for steps may train.
        in_torch: its tensors are torch's, whose memory is counted.
        absent: why it is left out, where that is known before.
    """

    name: str
    dtype: str
    make: Callable[[], Step]
    check: Callable[[], Parity] | None = None
    needs: tuple[str, ...] = ()
    figures: Callable[[], dict[str, float]] | None = None
    in_torch: bool = True
    absent: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        suite, name: together unique; `name` says the conditions shortly.
        conditions: what the figures depend on, for the result file.
        shares_products: whether rows say, on a CPU, how much of a step is matrix products.
    """

    suite: str
    name: str
    work: Work
    providers: Sequence[Provider]
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    shares_products: bool = False


@dataclass
class Row:
    """What is known of one provider in one case; figures are None where they mean nothing.

    Attributes:
        status: measured, skipped (cannot run here), refused (parity), failed.
        reason: of a row without figures.
        parity: the largest error as a share of what the rule allows.
        mfu: the rate of operations as a share of the measured rate of large products.
        share_of_floor: the floor's time over the time taken.
        step_mib: the most memory that a step's tensors hold at once.
        matrix_share: the part of a step's time in matrix products.
        figures: of accuracy.
    """

    provider: str
    dtype: str
    status: str = MEASURED
    reason: str = ""
    parity: float | None = None
    ms: Spread | None = None
    samples_ms: list[float] = field(default_factory=list)
    real_tokens_per_s: float | None = None
    tflop_per_s: float | None = None
    gb_per_s: float | None = None
    mfu: float | None = None
    share_of_floor: float | None = None
    step_mib: float | None = None
    matrix_share: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.provider} {self.dtype}"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast `ours` is as `peer`."""

    ours: str
    peer: str
    speedup: Spread


@dataclass
class Measured:
    """A case with its rows; `ratios` of our rows to all others of the dtype, and to fp32."""

    case: Case
    rows: list[Row]
    ratios: list[Ratio]


def measure(
    case: Case,
    timer: Timer,
    device: torch.device,
    ceilings: Ceilings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Check parity, then time all providers in turn.

    Args:
        case: what is compared.
        timer: takes the steps in turn.
        device: that is measured.
        ceilings: of the machine; None for no shares of them.
        say: told what happens.
    """
    rows, steps = [], {}
    for provider in case.providers:
        row = Row(provider.name, provider.dtype)
        rows.append(row)
        say(f"{case.suite}, {case.name}: {row.label}")
        step = _prepared(provider, row, device)
        if step is not None:
            steps[row.label] = step
            if provider.in_torch:
                row.step_mib = round(step_mib(step, device), 2)
                if case.shares_products and device.type == "cpu":
                    row.matrix_share = round(matrix_share(step), 3)
    say(f"{case.suite}, {case.name}: timing")
    times = timer(steps)
    for provider, row in zip(case.providers, rows, strict=True):
        if row.label in times:
            _fill(row, times[row.label], case.work, ceilings)
            if provider.figures is not None:
                row.figures = provider.figures()
    return Measured(case, rows, _ratios(rows, times))


def _prepared(provider: Provider, row: Row, device: torch.device) -> Step | None:
    """A step that has run once; None, and the row says why, where there is none."""
    row.reason = provider.absent or missing(provider.needs, device)
    if row.reason:
        row.status = SKIPPED
        return None
    try:
        if provider.check is not None:
            judged = provider.check()
            row.parity = round(judged.worst(), 3)
            failures = judged.failures()
            if failures:
                more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
                row.status, row.reason = REFUSED, f"{failures[0]}{more}"
                return None
        step = provider.make()
        step()
    except InputError:
        raise
    except Exception as error:  # a peer may break in any words: they go into the row
        row.status = FAILED
        row.reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return None
    return step


def _fill(row: Row, times_ms: list[float], work: Work, ceilings: Ceilings | None) -> None:
    row.samples_ms = [round(value, 4) for value in times_ms]
    row.ms = rounded(spread(times_ms), 4)
    seconds = spread(times_ms).median / 1e3
    if work.real_tokens:
        row.real_tokens_per_s = round(work.real_tokens / seconds)
    if work.operations:
        row.tflop_per_s = _digits(work.operations / seconds / 1e12)
    if work.moved_bytes:
        row.gb_per_s = _digits(work.moved_bytes / seconds / 1e9)
    if ceilings is None or row.dtype not in ceilings.tflop_per_s:
        return
    if work.operations:
        rate = work.operations / seconds / 1e12
        row.mfu = _digits(rate / ceilings.tflop_per_s[row.dtype])
    floor_ms = ceilings.floor_ms(work.moved_bytes, work.operations, row.dtype)
    if floor_ms:
        row.share_of_floor = _digits(floor_ms / (1e3 * seconds))


def _ratios(rows: Sequence[Row], times: Mapping[str, list[float]]) -> list[Ratio]:
    found = []
    for ours in rows:
        if ours.provider != OURS or ours.label not in times:
            continue
        for peer in rows:
            comparable = peer.dtype == ours.dtype or (
                peer.dtype == "fp32" and peer.provider != OURS
            )
            if peer is ours or peer.label not in times or not comparable:
                continue
            ratio = speedup(times[peer.label], times[ours.label])
            found.append(Ratio(ours.label, peer.label, rounded(ratio, 3)))
    return found


def rounded(values: Spread, digits: int) -> Spread:
    """Every figure to so many digits after the point."""
    return Spread(*(round(v, digits) for v in (values.median, values.lowest, values.highest)))


def _digits(value: float, digits: int = 4) -> float:
    """To so many digits that count."""
    if not value or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
