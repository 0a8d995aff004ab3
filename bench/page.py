"""`fastbert bench page`: the charts of result files, and one HTML page that gathers them."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench import charts, results
from fastbert.errors import InputError
from fastbert.files import atomic_write

# of the sweep: quantity -> what its axis says
AXES = {
    "length": "longest sequence, tokens",
    "batch": "sequences a batch",
    "hidden": "hidden size",
    "vocabulary": "words in the vocabulary",
}
# in a title, where its name alone would not do
CALLED = {"batch": "batch size", "hidden": "hidden size"}
COST = "ms a thousand real tokens"
TITLES = {
    "train-step": "One training step",
    "encode": "Texts to vectors",
    "layer": "One encoder layer",
    "ablation": "One training step, one technique off at a time",
    "pretrain": "Pre-training on real text",
    "finetune": "Fine-tuning on real labels",
    "kernels": "One operator",
}
STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --muted: #6b7280; --rule: #e5e7eb; }
body { font: 15px/1.5 Inter, system-ui, sans-serif; color: var(--ink); margin: 0 auto;
  max-width: 1040px; padding: 40px 24px 80px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 48px 0 4px; }
p.machine, p.note { color: var(--muted); font-size: 13px; margin: 2px 0; }
figure { margin: 20px 0; } figure svg { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px; }
table { border-collapse: collapse; font-size: 13px; margin: 12px 0; width: 100%; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; color: #d9480f; } td.said { text-align: left; color: var(--muted); }
"""


def drawn(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and figures of one result file's charts."""
    suite = found["bench"]
    if suite == "sweep":
        yield from _swept(found)
        return
    if suite == "kernels" and found["ceilings"]:
        title = "Our operators below this machine's measured ceilings"
        yield "roofline", charts.roofline(found, title)
        return
    if suite == "breakdown":
        for number, case in enumerate(found["cases"]):
            parts = {results.label(r): r["figures"] for r in charts.measured(case)}
            yield (
                f"breakdown-{number}",
                charts.breakdown(parts, f"Where a step goes: {case['name']}"),
            )
        return
    if suite == "packing":
        return
    for number, case in enumerate(found["cases"]):
        if charts.measured(case):
            yield (
                f"{suite}-{number}",
                charts.bars(case, f"{TITLES.get(suite, suite)}: {case['name']}"),
            )


def pictures(runs: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw every chart of the runs into a folder, as SVG and PNG."""
    charts.pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    return [
        path
        for found in runs
        for name, figure in drawn(found)
        for path in charts.save(figure, folder / name)
    ]


def write_page(runs: Sequence[dict[str, Any]], folder: Path) -> Path:
    """One HTML page with every chart inside and the tables below them."""
    written = pictures(runs, folder)
    vectors = {path.stem: path for path in written if path.suffix == ".svg"}
    parts = [
        "<!doctype html>",
        '<html lang="en"><meta charset="utf-8"><title>fastbert bench</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        "<h1>fastbert bench</h1>",
    ]
    for found in runs:
        parts.append(f"<h2>{html.escape(found['bench'])}</h2>")
        lines = [*results.machine_lines(found["machine"]), found["command"]]
        parts += [f'<p class="machine">{html.escape(line)}</p>' for line in lines]
        names = [name for name in vectors if _belongs(name, found)]
        inside = "".join(f"<figure>{_inline(vectors[name])}</figure>" for name in names)
        parts.append(f'<div class="pair">{inside}</div>' if found["bench"] == "sweep" else inside)
        for case in found["cases"]:
            parts.append(_table(case))
    path = folder / "index.html"
    with atomic_write(path) as file:
        file.write("\n".join(parts) + "\n")
    return path


def _swept(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    by_quantity: dict[str, list[dict[str, Any]]] = {}
    for case in found["cases"]:
        by_quantity.setdefault(case["conditions"]["quantity"], []).append(case)
    for quantity, cases in by_quantity.items():
        if len(cases) < 2:
            continue
        if quantity == "padding":
            title = "Speed-up against padding, one training step"
            yield "sweep-padding", charts.against_padding(cases, title)
        else:
            title = f"Cost against {CALLED.get(quantity, quantity)}, one training step"
            yield f"sweep-{quantity}", charts.growth(cases, AXES[quantity], title, COST)


def _belongs(name: str, found: dict[str, Any]) -> bool:
    return name.startswith(f"{found['bench']}-") or (
        name == "roofline" and found["bench"] == "kernels"
    )


def _inline(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]


def _table(case: dict[str, Any]) -> str:
    heads = ["", "ms", "lowest", "highest", "real tokens/s", "MiB a step", "of error bound"]
    figures = list(dict.fromkeys(n for row in case["rows"] for n in row.get("figures", ())))
    heads += figures
    rows = []
    for row in case["rows"]:
        kind = ' class="ours"' if row["provider"] == "fastbert" else ""
        name = f"<td>{html.escape(results.label(row))}</td>"
        if row["status"] != "measured":
            said = html.escape(f"{row['status']}: {row['reason']}")
            cells = f'<td class="said" colspan="{len(heads) - 1}">{said}</td>'
        else:
            ms = row["ms"]
            values = [f"{ms[end]:,.4g}" for end in ("median", "lowest", "highest")]
            values += [
                f"{row[field]:{form}}" if field in row else ""
                for field, form in (
                    ("real_tokens_per_s", ",.0f"),
                    ("step_mib", ",.1f"),
                    ("parity", ".2f"),
                )
            ]
            values += [f"{row.get('figures', {}).get(figure, ''):}" for figure in figures]
            cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f"<tr{kind}>{name}{cells}</tr>")
    heads[0] = case["name"]
    head = "".join(f"<th>{html.escape(str(title))}</th>" for title in heads)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in case["notes"])
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>{notes}"


def main(arguments: Sequence[str]) -> int:
    """Write pictures and page."""
    parser = argparse.ArgumentParser(prog="fastbert bench page", description=__doc__)
    parser.add_argument("files", nargs="+", help="result files of --json")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        raise InputError(f"--out {given.out}: is no folder")
    runs = [results.read(file) for file in given.files]
    print(write_page(runs, given.out))
    return 0
