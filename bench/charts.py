"""Pictures of result files: speed and memory side by side, sweeps, roofline, step breakdown.

Every function takes a case of a result file and returns a matplotlib figure; `save` writes it as
SVG and PNG. Ours is the one strong colour, peers are greys and muted tones, refused rows are named.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench.results import label
from fastbert.errors import InputError

# between two lines of names, in 1/72 inch
LINE_POINTS = 11.0
INK, MUTED, GRID, OURS_COLOUR = "#1b1f24", "#6b7280", "#e5e7eb", "#d9480f"
PEER_COLOURS = ("#9ca3af", "#64748b", "#94a3b8", "#57606a", "#a8a29e", "#78716c")
LINE_COLOURS = ("#2563eb", "#0d9488", "#7c3aed", "#64748b", "#ca8a04")
SANS = ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"]


def pyplot() -> Any:
    """matplotlib without a screen, in this module's style.

    Raises:
        InputError: it is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise InputError(
            "matplotlib is not installed, and the charts need it: pip install 'fastbert[bench]'"
        ) from None
    matplotlib.use("Agg")
    # what is not installed is passed over quietly
    importlib.import_module("logging").getLogger("matplotlib.font_manager").setLevel("ERROR")
    found = importlib.import_module("matplotlib.pyplot")
    found.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.sans-serif": SANS,
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": MUTED,
            "axes.edgecolor": GRID,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.color": MUTED,
            "ytick.color": INK,
            "svg.hashsalt": "fastbert",
            "svg.fonttype": "none",
        }
    )
    return found


def save(figure: Any, path: Path) -> list[Path]:
    """Write the figure beside each other as .svg and .png; the same input gives the same bytes."""
    written = [path.with_suffix(".svg"), path.with_suffix(".png")]
    figure.savefig(written[0], bbox_inches="tight", pad_inches=0.15, metadata={"Date": None})
    figure.savefig(written[1], bbox_inches="tight", pad_inches=0.15, dpi=150)
    pyplot().close(figure)
    return written


def measured(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have a time."""
    return [row for row in case["rows"] if row["status"] == "measured"]


def bars(case: dict[str, Any], title: str) -> Any:
    """Tokens a second and memory of a step, a bar a provider, ours first in each dtype."""
    rows = measured(case)
    panels = [("real tokens a second", "real_tokens_per_s", "{:,.0f}")]
    if any("step_mib" in row for row in rows):
        panels.append(("memory of a step, MiB", "step_mib", "{:,.0f}"))
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(9.6, 0.9 + 0.34 * len(rows)), sharey=True, squeeze=False
    )
    names = [label(row) for row in rows]
    places = list(range(len(rows)))
    for axis, (heading, field, form) in zip(axes[0], panels, strict=True):
        values = [row.get(field, 0) for row in rows]
        axis.barh(places, values, color=_colours(rows), height=0.68)
        axis.set_title(heading, color=MUTED, fontsize=9.5, fontweight="normal", pad=6)
        axis.set_yticks(places, names)
        axis.invert_yaxis() if axis is axes[0][0] else None
        _bare(axis)
        is_rate = field == "real_tokens_per_s"
        # a figure stands behind its bar, and behind the end of its spread
        ends = [_fastest(row, case) if is_rate else v for row, v in zip(rows, values, strict=True)]
        top = max(ends) or 1
        for place, row, value, end in zip(places, rows, values, ends, strict=True):
            text = form.format(value) if field in row else "not counted"
            weight = "bold" if _is_ours(row) else "normal"
            colour = INK if field in row else MUTED
            axis.text(end + 0.015 * top, place, text, va="center", fontsize=9, color=colour,
                      fontweight=weight)  # fmt: skip
        if is_rate:
            _spreads(axis, rows, case["work"]["real_tokens"], places)
        axis.set_xlim(0, 1.2 * top)
    for tick, row in zip(axes[0][0].get_yticklabels(), rows, strict=True):
        if _is_ours(row):
            tick.set_fontweight("bold")
            tick.set_color(OURS_COLOUR)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.tight_layout(w_pad=2.0)
    return figure


def growth(cases: Sequence[dict[str, Any]], axis_name: str, title: str, unit: str) -> Any:
    """Milliseconds a thousand real tokens against one quantity, a line a provider."""
    figure, axis = pyplot().subplots(figsize=(6.4, 4.0))
    for number, (name, points) in enumerate(_lines(cases)):
        xs, ys = zip(*points, strict=True)
        ours = name.startswith("fastbert")
        colour = OURS_COLOUR if ours else LINE_COLOURS[number % len(LINE_COLOURS)]
        axis.plot(xs, ys, color=colour, linewidth=2.4 if ours else 1.6, marker="o", markersize=4,
                  zorder=3 if ours else 2)  # fmt: skip
        axis.annotate(
            name,
            (xs[-1], ys[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            fontweight="bold" if ours else "normal",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(axis_name)
    axis.set_ylabel(unit)
    points = sorted({case["conditions"]["value"] for case in cases})
    axis.set_xticks(points, [f"{point:,}" for point in points], fontsize=9)
    axis.minorticks_off()
    _round_ticks(axis)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, pad=10)
    figure.tight_layout()
    return figure


def against_padding(cases: Sequence[dict[str, Any]], title: str) -> Any:
    """How many times as fast as each peer, against the share of padding in its batch."""
    figure, axis = pyplot().subplots(figsize=(6.4, 4.0))
    lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for case in cases:
        work = case["work"]
        share = 100 * (1 - work["real_tokens"] / work["padded_tokens"])
        for ratio in case["ratios"]:
            dtype = ratio["ours"].rsplit(" ", 1)[1]
            if ratio["peer"].endswith(dtype):
                lines.setdefault(ratio["peer"], []).append((share, ratio["speedup"]))
    for number, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        xs = [share for share, _ in points]
        ys = [speedup["median"] for _, speedup in points]
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        low = [speedup["lowest"] for _, speedup in points]
        high = [speedup["highest"] for _, speedup in points]
        axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=4, clip_on=False)
        axis.annotate(
            f"{name}: {ys[-1]:.1f}x",
            (xs[-1], ys[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
        )
    axis.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axis.text(0.5, 1.0, "as fast as the peer", fontsize=8.5, color=MUTED, va="bottom")
    axis.set_xlabel("padding in the peer's batch, %")
    axis.set_ylabel("times as fast")
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, pad=10)
    figure.tight_layout()
    return figure


def roofline(found: dict[str, Any], title: str) -> Any:
    """Our operators' rates against operations a byte, below the machine's measured ceilings."""
    figure, axis = pyplot().subplots(figsize=(7.2, 4.4))
    ceilings = found["ceilings"]
    bandwidth = ceilings["copy_gb_per_s"] / 1e3
    points = list(_roofline_points(found))
    low = min((x for _, _, x, _ in points), default=1.0) / 4
    high = max((x for _, _, x, _ in points), default=100.0) * 6
    for number, (dtype, peak) in enumerate(ceilings["tflop_per_s"].items()):
        colour = (MUTED, INK)[number % 2]
        ridge = peak / bandwidth
        axis.plot([low, ridge, high], [1e3 * low * bandwidth, 1e3 * peak, 1e3 * peak],
                  color=colour, linewidth=1.6, zorder=1)  # fmt: skip
        axis.text(1.9 * ridge, 1.06e3 * peak, f"{dtype}: {1e3 * peak:,.0f} GFLOP/s", fontsize=9,
                  color=colour)  # fmt: skip
    markers = {"fp32": "s", "bf16": "o"}
    for _, dtype, intensity, rate in points:
        axis.scatter([intensity], [1e3 * rate], color=OURS_COLOUR, marker=markers[dtype], s=34,
                     zorder=3)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    ticker = importlib.import_module("matplotlib.ticker")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.minorticks_off()
    axis.set_xlabel("operations a byte that must be moved (1 where an operator only moves)")
    axis.set_ylabel("GFLOP/s")
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, pad=10)
    figure.tight_layout()
    _name_points(axis, points, (low * high) ** 0.5, list(ceilings["tflop_per_s"].values()))
    return figure


def _name_points(
    axis: Any,
    points: Sequence[tuple[str, str, float, float]],
    middle: float,
    peaks: Sequence[float],
) -> None:
    """Names beside the points, towards the middle, where there is room; none upon another, nor
    upon a ceiling of so many TFLOP/s."""

    def height_of(rate: float) -> float:
        # in points of 1/72 inch, which text is measured in
        return float(axis.transData.transform((middle, 1e3 * rate))[1]) * 72 / axis.figure.dpi

    lowest = {1: float("inf"), -1: float("inf")}
    for name, dtype, intensity, rate in sorted(points, key=lambda point: -point[3]):
        side = -1 if intensity > middle else 1
        height = height_of(rate)
        lowest[side] = min(height - 3.0, lowest[side] - LINE_POINTS)
        for ceiling in map(height_of, peaks):
            if side < 0 and lowest[side] < ceiling < lowest[side] + LINE_POINTS:
                lowest[side] = ceiling - LINE_POINTS
        axis.annotate(
            f"{name} {dtype}",
            (intensity, 1e3 * rate),
            xytext=(7 * side, lowest[side] - height),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            fontsize=8.5,
            color=INK,
        )


def breakdown(parts: dict[str, dict[str, float]], title: str) -> Any:
    """Where a step's time goes, a stacked bar a program: milliseconds by kind of work."""
    figure, axis = pyplot().subplots(figsize=(9.6, 0.9 + 0.62 * len(parts)))
    kinds = list(dict.fromkeys(kind for times in parts.values() for kind in times))
    palette = ("#d9480f", "#2563eb", "#0d9488", "#7c3aed", "#ca8a04", "#64748b", "#cbd5e1")
    for place, times in enumerate(parts.values()):
        left, total = 0.0, sum(times.values())
        for number, kind in enumerate(kinds):
            value = times.get(kind, 0.0)
            axis.barh(
                [place],
                [value],
                left=left,
                height=0.6,
                color=palette[number % 7],
                label=kind if place == 0 else None,
                edgecolor="white",
                linewidth=0.8,
            )
            if value > 0.07 * max(sum(each.values()) for each in parts.values()):
                axis.text(left + value / 2, place, f"{value / total:.0%}", ha="center",
                          va="center", color="white", fontsize=9)  # fmt: skip
            left += value
        axis.annotate(f"{total:,.0f} ms", (left, place), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axis.set_yticks(range(len(parts)), list(parts))
    axis.invert_yaxis()
    _bare(axis)
    axis.legend(ncol=4, loc="upper left", bbox_to_anchor=(0, -0.04), frameon=False, fontsize=9,
                handlelength=1.0, columnspacing=1.4)  # fmt: skip
    axis.set_title(title, pad=10)
    figure.tight_layout()
    return figure


def _lines(
    cases: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    names = dict.fromkeys(label(row) for case in cases for row in measured(case))
    for name in names:
        points = [
            (case["conditions"]["value"], 1e6 / row["real_tokens_per_s"])
            for case in cases
            for row in measured(case)
            if label(row) == name and row.get("real_tokens_per_s")
        ]
        if points:
            yield name, sorted(points)


def _roofline_points(found: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Name, dtype, operations a byte and TFLOP/s of our operators; one that only moves bytes is
    drawn at one operation a byte, in bf16 alone."""
    for case in found["cases"]:
        work = case["work"]
        if not work["moved_bytes"]:
            continue
        name = case["name"].rsplit(", ", 1)[0].replace(", forward + backward", "")
        for row in measured(case):
            if (
                row["provider"] != "fastbert"
                or row["dtype"] not in found["ceilings"]["tflop_per_s"]
            ):
                continue
            if work["operations"]:
                intensity = work["operations"] / work["moved_bytes"]
                yield name, row["dtype"], intensity, row["tflop_per_s"]
            elif row["dtype"] == "bf16":
                yield name, row["dtype"], 1.0, row["gb_per_s"] / 1e3


def _spreads(axis: Any, rows: Sequence[dict[str, Any]], tokens: int, places: list[int]) -> None:
    for place, row in zip(places, rows, strict=True):
        ends = [1e3 * tokens / row["ms"][end] for end in ("highest", "lowest")]
        axis.plot(ends, [place, place], color=INK, linewidth=1.1, alpha=0.55, solid_capstyle="butt")


def _fastest(row: dict[str, Any], case: dict[str, Any]) -> float:
    return 1e3 * float(case["work"]["real_tokens"]) / float(row["ms"]["lowest"])


def _colours(rows: Sequence[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(row["provider"] for row in rows if not _is_ours(row)))
    return [
        OURS_COLOUR
        if _is_ours(row)
        else PEER_COLOURS[peers.index(row["provider"]) % len(PEER_COLOURS)]
        for row in rows
    ]


def _is_ours(row: dict[str, Any]) -> bool:
    return str(row["provider"]) == "fastbert"


def _bare(axis: Any) -> None:
    """Bars carry their figures: no axis repeats them."""
    axis.set_xticks([])
    for spine in ("bottom", "left"):
        axis.spines[spine].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _round_ticks(axis: Any) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    axis.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
