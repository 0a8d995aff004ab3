"""Result files: what was measured, on what, by which command, with every sample."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastbert.bench import machine
from fastbert.bench.ceilings import Ceilings
from fastbert.bench.registry import Measured
from fastbert.errors import InputError
from fastbert.files import atomic_write

FORMAT = 1


def result(
    suite: str,
    *,
    device: torch.device,
    ceilings: Ceilings | None,
    arguments: Sequence[str],
    repeats: int,
) -> dict[str, Any]:
    """A run as it goes into its file, without a case yet."""
    return {
        "format": FORMAT,
        "bench": suite,
        "command": " ".join(["fastbert", "bench", suite, *arguments]),
        "arguments": list(arguments),
        "ended": _now(),
        # of the minute before; far above the threads that measure, others were at work
        "load_average": _load(),
        "machine": machine.describe(device),
        "ceilings": None if ceilings is None else asdict(ceilings),
        "repeats": repeats,
        "cases": [],
    }


def add(found: dict[str, Any], measured: Measured) -> None:
    """One more case of the run."""
    found["cases"].append(_case(measured))
    found["ended"] = _now()
    found["load_average"] = max(found["load_average"], _load())


def _load() -> float:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _case(found: Measured) -> dict[str, Any]:
    case = found.case
    return {
        "suite": case.suite,
        "name": case.name,
        "conditions": case.conditions,
        "work": asdict(case.work),
        "notes": list(case.notes),
        "rows": [_present(asdict(row)) for row in found.rows],
        "ratios": [asdict(ratio) for ratio in found.ratios],
    }


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """Without what means nothing for the row."""
    return {name: value for name, value in row.items() if value not in (None, "", [], {})}


def write(path: Path, found: dict[str, Any]) -> None:
    """One JSON file, whole or absent."""
    with atomic_write(path) as file:
        json.dump(found, file, indent=1)
        file.write("\n")


def read(path: Path | str) -> dict[str, Any]:
    """A result file of the registry.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no result of fastbert bench: not UTF-8") from None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: is no JSON: {error.msg}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "cases" not in found:
        raise InputError(
            f"{path}: is no result of fastbert bench in format {FORMAT}; write one with --json"
        )
    return found


def label(row: dict[str, Any]) -> str:
    """Provider and dtype of a row in a file."""
    return f"{row['provider']} {row['dtype']}"


def machine_lines(host: dict[str, Any]) -> list[str]:
    """What was measured on, in two lines."""
    device = f", {host['gpu']} (driver {host.get('driver')})" if "gpu" in host else ""
    versions = [
        f"{name} {host[name]}" for name in ("torch", *machine.PACKAGES[1:]) if host.get(name)
    ]
    return [
        f"{host['cpu']} ({host['cpu_class']}, family {host['cpu_family']}), {host['threads']} of "
        f"{host['cores']} threads{device}",
        f"{', '.join(versions)}, python {host['python']}, commit {host['commit']}",
    ]


def table(found: dict[str, Any]) -> str:
    """A run as lines for a terminal."""
    lines = machine_lines(found["machine"])
    if found["ceilings"]:
        rates = ", ".join(
            f"{dtype} {1e3 * rate:,.0f} GFLOP/s"
            for dtype, rate in found["ceilings"]["tflop_per_s"].items()
        )
        lines.append(
            f"measured ceilings: copy {found['ceilings']['copy_gb_per_s']:.1f} GB/s, {rates}"
        )
    lines.append(f"{found['command']}; {found['repeats']} rounds{busy(found)}")
    for case in found["cases"]:
        lines += ["", *_case_lines(case)]
    return "\n".join(lines)


def busy(found: dict[str, Any]) -> str:
    """What is to be said of a machine that did other work beside; empty where it did not."""
    load = found.get("load_average", 0.0)
    if load <= found["machine"]["threads"] + 1.5:
        return ""
    return f", on a machine that did other work beside (load average {load:g})"


def _case_lines(case: dict[str, Any]) -> list[str]:
    work = case["work"]
    said = f", {work['real_tokens']:,} real tokens" if work["real_tokens"] else ""
    if work["padded_tokens"]:
        share = 1 - work["real_tokens"] / work["padded_tokens"]
        said += f" of {work['padded_tokens']:,} padded ({share:.0%} padding)"
    columns = _columns(case)
    head = "".join(f"{title:>{width}}" for title, width, _ in columns)
    lines = [f"{case['suite']}, {case['name']}{said}", f"  {'':34}{head}"]
    for row in case["rows"]:
        if row["status"] != "measured":
            lines.append(f"  {label(row):<34}  {row['status']}: {row['reason']}")
            continue
        cells = "".join(f"{cell(row):>{width}}" for _, width, cell in columns)
        lines.append(f"  {label(row):<34}{cells}")
    lines += [f"    {ratio_line(ratio)}" for ratio in case["ratios"]]
    return [*lines, *(f"    note: {note}" for note in case["notes"])]


def ratio_line(ratio: dict[str, Any]) -> str:
    """One comparison with its spread."""
    times = ratio["speedup"]
    return (
        f"{ratio['ours']} is {times['median']:.2f}x {ratio['peer']} "
        f"({times['lowest']:.2f}..{times['highest']:.2f} by round)"
    )


def _columns(case: dict[str, Any]) -> list[tuple[str, int, Any]]:
    """The columns that have a figure in this case: title, width, and the cell of a row."""
    figures = list(dict.fromkeys(name for row in case["rows"] for name in row.get("figures", ())))

    def number(name: str, form: str) -> Any:
        return lambda row: "-" if row.get(name) is None else form.format(row[name])

    def figure(name: str) -> Any:
        return lambda row: (
            "-" if name not in row.get("figures", {}) else f"{row['figures'][name]:.4g}"
        )

    every = [
        ("median ms", 12, lambda row: f"{row['ms']['median']:.3g}" if row["ms"]["median"] < 10
         else f"{row['ms']['median']:.1f}"),
        ("min..max", 20, lambda row: f"{row['ms']['lowest']:.4g}..{row['ms']['highest']:.4g}"),
        ("tokens/s", 11, number("real_tokens_per_s", "{:,.0f}")),
        ("TFLOP/s", 10, number("tflop_per_s", "{:.4g}")),
        ("GB/s", 8, number("gb_per_s", "{:.3g}")),
        ("MFU", 7, number("mfu", "{:.0%}")),
        ("of floor", 10, number("share_of_floor", "{:.0%}")),
        ("step MiB", 10, number("step_mib", "{:,.1f}")),
        ("products", 10, number("matrix_share", "{:.0%}")),
        ("parity", 8, number("parity", "{:.2f}")),
    ]  # fmt: skip
    names = ["", "", "real_tokens_per_s", "tflop_per_s", "gb_per_s", "mfu", "share_of_floor",
             "step_mib", "matrix_share", "parity"]  # fmt: skip
    kept = [
        column
        for name, column in zip(names, every, strict=True)
        if not name or any(row.get(name) is not None for row in case["rows"])
    ]
    return kept + [(name, max(10, len(name) + 2), figure(name)) for name in figures]
