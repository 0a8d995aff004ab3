"""What a run shows while it goes: a progress bar or log lines, metrics.jsonl, curves.png."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from fastbert.files import atomic_write, writing_failed
from fastbert.training.result import StepResult
from fastbert.training.schedule import Budget
from fastbert.training.spikes import Spike
from fastbert.training.state import TrainState
from fastbert.training.trackers import Tracker, scalars

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
# between two records; a plain log gets a line less often than the file
RECORD_SECONDS, LINE_SECONDS = 2.0, 15.0
# of a spike's samples; metrics.jsonl has them all
SHOWN_SAMPLES = 8
# share of the time waiting for batches from which a line tells it
SHOWN_STALL = 0.01


class Meter:
    """Gathers steps into records, and shows them.

    Args:
        folder: where metrics.jsonl goes; a resumed run appends.
        label: in front of the bar or line.
        stream: where to show; a bar on a terminal, plain lines elsewhere.
        trackers: told of every record too.
        peak: operations a second that the devices could do at most, for MFU; None where unknown.

    Attributes:
        last_loss: mean loss of the last record.
        step_loss: of the last step of the last record.
        skipped, skipped_in_a_row: steps whose gradients were not finite, so that nothing changed:
            since the start, and up to the last record's end.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        stream: IO[str] | None = None,
        trackers: Sequence[Tracker] = (),
        peak: float | None = None,
    ) -> None:
        self.folder, self.label = folder, label
        self.trackers, self.peak = trackers, peak
        self.stream = stream or sys.stderr
        self.last_loss = self.step_loss = 0.0
        self.skipped = self.skipped_in_a_row = 0
        _drop_torn_line(folder / METRICS_FILE)
        self._results: list[StepResult] = []
        self._recorded = self._shown = time.monotonic()
        self._bar: Any = None

    def step(
        self, state: TrainState, result: StepResult, learning_rate: float, budget: Budget
    ) -> None:
        """Take one optimiser step into account; shows and records now and then."""
        self._results.append(result)
        due = time.monotonic() - self._recorded >= RECORD_SECONDS
        done = budget.progress(state.step, state.seconds) >= 1.0
        if due or done or state.step == 1:
            self.flush(state, learning_rate, budget)

    def flush(self, state: TrainState, learning_rate: float, budget: Budget) -> None:
        """Record and show the steps since the last record, if there were any."""
        if not self._results:
            return
        now = time.monotonic()
        record = self._record(state, learning_rate, now - self._recorded)
        record["left_s"] = round(_left(state, budget), 1)
        self._recorded = now
        self._write(record)
        done = budget.progress(state.step, state.seconds) >= 1.0
        self._show(record, state, budget, now, done)

    def evaluation(self, state: TrainState, figures: dict[str, float]) -> None:
        """Record and show an evaluation."""
        self._write({"step": state.step, "seconds": round(state.seconds, 2), "eval": figures})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"{self.label}: step {state.step}: {shown}")

    def spike(self, spike: Spike, span: dict[str, int]) -> None:
        """Record and show a spike, and which steps were undone."""
        self._write({"spike": dataclasses.asdict(spike), **span})
        samples = ", ".join(map(str, spike.samples[:SHOWN_SAMPLES]))
        more = ", ..." if len(spike.samples) > SHOWN_SAMPLES else ""
        self.say(
            f"{self.label}: spike at step {spike.step}: loss {spike.loss:.4g} (usually "
            f"{spike.usual_loss:.4g}), gradient norm {spike.gradient_norm:.4g} (usually "
            f"{spike.usual_norm:.4g}), {spike.deviations:.1f} standard deviations; back to step "
            f"{span['from_step'] - 1}, without the batches of steps {span['from_step']} to "
            f"{span['to_step']}; samples {samples}{more}"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time of the steps."""
        began = time.monotonic()
        yield
        self._recorded += time.monotonic() - began

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is None:
            print(line, file=self.stream, flush=True)
        else:
            tqdm.write(line, file=self.stream)

    def close(self) -> None:
        """End the bar and the trackers."""
        for tracker in self.trackers:
            tracker.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _record(self, state: TrainState, learning_rate: float, seconds: float) -> dict[str, Any]:
        results, self._results = self._results, []
        masked = sum(r.targets.masked for r in results)
        labelled = sum(r.targets.labelled for r in results)
        record: dict[str, Any] = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 2),
            "learning_rate": learning_rate,
            "tokens_per_s": round(sum(r.tokens for r in results) / max(seconds, 1e-9), 1),
        }
        self.last_loss = 0.0
        for name, shown, count in (
            ("masked_lm_loss", "masked_lm_loss", masked),
            ("masked_lm_correct", "masked_lm_accuracy", masked),
            ("sequence_loss", "sequence_loss", labelled),
            ("sequence_correct", "sequence_accuracy", labelled),
        ):
            sums = [float(r.sums[name]) for r in results if name in r.sums]
            if sums and count:
                record[shown] = sum(sums) / count
                self.last_loss += record[shown] if shown.endswith("loss") else 0.0
        norms = [float(r.sums["gradient_norm"]) for r in results if "gradient_norm" in r.sums]
        if norms:
            record["gradient_norm"] = sum(norms) / len(norms)
        record.update(_efficiency(results, max(seconds, 1e-9), self.peak))
        self._count_skipped(results)
        if self.skipped:
            record["skipped_steps"] = self.skipped
        return record

    def _count_skipped(self, results: list[StepResult]) -> None:
        for result in results:
            skipped = "skipped" in result.sums and bool(result.sums["skipped"])
            self.skipped += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        last = results[-1].sums
        self.step_loss = sum(float(value) for name, value in last.items() if name.endswith("loss"))

    def _write(self, record: dict[str, Any]) -> None:
        path = self.folder / METRICS_FILE
        figures = dict(scalars(record, ""))
        for tracker in self.trackers:
            tracker.write(record.get("step", 0), figures)
        # JSON knows no NaN
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise writing_failed(path, error) from error

    def _show(
        self, record: dict[str, Any], state: TrainState, budget: Budget, now: float, done: bool
    ) -> None:
        progress = budget.progress(state.step, state.seconds)
        left = _left(state, budget)
        figures = _figures(record)
        if self.stream.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=100,
                    file=self.stream,
                    bar_format="{percentage:3.0f}%|{bar:5}| {desc}",
                )
            self._bar.n = round(100 * progress)
            self._bar.set_description_str(f"{self.label} {_clock(left)} left{_brief(record)}")
        elif now - self._shown >= LINE_SECONDS or state.step == 1 or done:
            self._shown = now
            self.say(
                f"{self.label} {100 * progress:3.0f}%  step {state.step}  {figures}"
                f"  {_clock(left)} left"
            )


class NoMeter(Meter):
    """Says and writes nothing: another rank does."""

    def __init__(self) -> None:
        self.last_loss = self.step_loss = 0.0
        self.skipped = self.skipped_in_a_row = 0

    def step(
        self, state: TrainState, result: StepResult, learning_rate: float, budget: Budget
    ) -> None:
        """Nothing."""

    def flush(self, state: TrainState, learning_rate: float, budget: Budget) -> None:
        """Nothing."""

    def evaluation(self, state: TrainState, figures: dict[str, float]) -> None:
        """Nothing."""

    def spike(self, spike: Spike, span: dict[str, int]) -> None:
        """Nothing."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing."""
        yield

    def close(self) -> None:
        """Nothing."""


def _efficiency(results: list[StepResult], seconds: float, peak: float | None) -> dict[str, Any]:
    """How well time, room and device were used."""
    found: dict[str, Any] = {}
    slots = sum(r.slots for r in results)
    if slots:
        found["packing"] = round(sum(r.tokens for r in results) / slots, 4)
        found["loader_stall"] = round(sum(r.waited_s for r in results) / seconds, 4)
    rate = sum(r.operations for r in results) / seconds
    if rate:
        found["tflop_per_s"] = round(rate / 1e12, 4)
    if rate and peak:
        found["mfu"] = round(rate / peak, 4)
    found["memory_gib"] = round(_memory_bytes() / 2**30, 3)
    return found


def _memory_bytes() -> int:
    """The most this process has held: on the GPU where there is one, in all elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but on a Mac
    return peak if sys.platform == "darwin" else 1024 * peak


def _left(state: TrainState, budget: Budget) -> float:
    """Seconds to the end at the pace so far."""
    progress = budget.progress(state.step, state.seconds)
    return state.seconds * (1.0 - progress) / max(progress, 1e-9)


def _drop_torn_line(path: Path) -> None:
    """A process that was killed may have left half a record at the end."""
    if not path.is_file():
        return
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if kept != whole:
        with atomic_write(path, "wb") as file:
            file.write(kept)


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a run."""
    with open(Path(folder) / METRICS_FILE, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _figures(record: dict[str, Any]) -> str:
    parts = []
    for name, label, form in (
        ("masked_lm_loss", "mlm loss", "{:.3f}"),
        ("masked_lm_accuracy", "masked acc", "{:.1%}"),
        ("sequence_loss", "seq loss", "{:.3f}"),
        ("sequence_accuracy", "seq acc", "{:.1%}"),
        ("tokens_per_s", "real tok/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("loader_stall", "stalled", "{:.0%}"),
        ("skipped_steps", "skipped", "{}"),
    ):
        if name in record and (name != "loader_stall" or record[name] >= SHOWN_STALL):
            parts.append(f"{label} {form.format(record[name])}")
    return "  ".join(parts)


def _brief(record: dict[str, Any]) -> str:
    """The same for a terminal of 80 columns."""
    speed = record["tokens_per_s"]
    parts = [f"  {speed / 1000:.1f}k tok/s" if speed >= 1000 else f"  {speed:.0f} tok/s"]
    for objective, label in (("masked_lm", "mlm"), ("sequence", "seq")):
        loss, accuracy = record.get(f"{objective}_loss"), record.get(f"{objective}_accuracy")
        if loss is not None and accuracy is not None:
            parts.append(f"  {label} {loss:.2f} {accuracy:.0%}")
    if "skipped_steps" in record:
        parts.append(f"  skipped {record['skipped_steps']}")
    return "".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
