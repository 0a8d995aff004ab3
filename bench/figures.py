"""`fastbert bench figures`: README's figures, charts and the page, from committed result files.

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` in README.md and
docs/performance.md is written from bench/results, so that no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench import machine, results
from fastbert.errors import InputError
from fastbert.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
PAGES = (Path("README.md"), Path("docs/performance.md"))
# the machine that README speaks of
CLASS = "cpu-avx512_bf16"
BLOCK = re.compile(r"<!-- figures: ([a-z-]+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)


def load(root: Path, suite: str, of_class: str = CLASS) -> dict[str, Any]:
    """The committed run of a suite on one class of machine."""
    return results.read(root / RESULTS / f"{suite}-{of_class}.json")


def written(text: str, root: Path, page: Path = PAGES[0]) -> str:
    """A page's text with every block made anew; links begin where the page lies.

    Raises:
        InputError: a block of a name that nobody makes.
    """

    def block(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in BLOCKS:
            raise InputError(f"figures: no block {name!r}; there are {', '.join(BLOCKS)}")
        made = BLOCKS[name](root).replace("](bench/", f"]({'../' * (len(page.parts) - 1)}bench/")
        return f"<!-- figures: {name} -->\n{made}\n<!-- end of figures -->"

    return BLOCK.sub(block, text)


def headline(root: Path) -> str:
    """The one figure with its conditions."""
    found = load(root, "train-step")
    batch = found["cases"][0]
    single = _speedup(batch, "fastbert bf16", "transformers bf16")
    plain = _speedup(batch, "fastbert fp32", "transformers fp32")
    share = 1 - batch["work"]["real_tokens"] / batch["work"]["padded_tokens"]
    return (
        f"One training step on a two-core CPU is **{plain['median']:.1f} times as fast as "
        f"transformers in fp32 and {single['median']:.1f} times in bf16**, on sentences of uneven "
        f"length ({share:.0%} of transformers' padded batch is padding): same weights, same "
        f"data, same losses and gradients by the [error rule](#how-we-know-it-is-right)"
        f"{results.busy(found)}."
    )


def train_step(root: Path) -> str:
    """The table of the training step."""
    found = load(root, "train-step")
    return "\n\n".join([_rows_table(case) for case in found["cases"]] + [_source(found)])


def encode(root: Path) -> str:
    """The table of texts to vectors."""
    found = load(root, "encode")
    return "\n\n".join([_rows_table(case) for case in found["cases"]] + [_source(found)])


def padding(root: Path) -> str:
    """Speed-up against padding, as a table."""
    found = load(root, "sweep")
    lines = ["| padding in the peer's batch | times as fast (by round) |", "|---|---|"]
    for case in found["cases"]:
        if case["conditions"]["quantity"] != "padding":
            continue
        times = _speedup(case, "fastbert bf16", "transformers bf16")
        lines.append(f"| {case['conditions']['value']:g} % | {_with_spread(times)} |")
    return "\n".join([*lines, "", _source(found)])


def ablation(root: Path) -> str:
    """What each technique bought, as a table."""
    found = load(root, "ablation")
    lines = ["| without | dtype | ms | the whole is faster by |", "|---|---|---|---|"]
    for case in found["cases"]:
        for row in case["rows"]:
            if row["status"] != "measured":
                lines.append(f"| {row['provider']} | {row['dtype']} | {row['reason']} | |")
                continue
            by = "" if row["provider"] == "fastbert" else _with_spread(
                _speedup(case, f"fastbert {row['dtype']}", results.label(row))
            )  # fmt: skip
            name = row["provider"].removeprefix("without ").replace("fastbert", "nothing")
            lines.append(f"| {name} | {row['dtype']} | {row['ms']['median']:,.0f} | {by} |")
    return "\n".join([*lines, "", _source(found)])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline,
    "train-step": train_step,
    "encode": encode,
    "padding": padding,
    "ablation": ablation,
}


def _rows_table(case: dict[str, Any]) -> str:
    """Provider, milliseconds, tokens a second, memory, accuracy, and how many times ours is."""
    figures = list(dict.fromkeys(n for row in case["rows"] for n in row.get("figures", ())))
    with_memory = any("step_mib" in row for row in case["rows"])
    titles = [case["name"], "ms", "real tokens/s", *(["MiB a step"] if with_memory else [])]
    titles += [*figures, "ours is faster by (by round)"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in case["rows"]:
        name = results.label(row)
        if row["status"] != "measured":
            said = f"{row['status']}: {row['reason']}"
            lines.append(f"| {name} | {said} |" + " |" * (len(titles) - 2))
            continue
        ratio = next(
            (r for r in case["ratios"] if r["peer"] == name and r["ours"].endswith(row["dtype"])),
            None,
        )
        cells = [f"**{name}**" if row["provider"] == "fastbert" else name]
        cells += [f"{row['ms']['median']:,.0f}", f"{row['real_tokens_per_s']:,}"]
        if with_memory:
            cells.append(f"{row['step_mib']:,.0f}" if "step_mib" in row else "-")
        cells += [f"{row.get('figures', {}).get(figure, '-')}" for figure in figures]
        cells.append("" if ratio is None else _with_spread(ratio["speedup"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _source(found: dict[str, Any]) -> str:
    host = found["machine"]
    device = host.get("gpu") or f"{host['cpu']} with {host['cpu_class']}, {host['threads']} threads"
    file = RESULTS / f"{found['bench']}-{machine.machine_class(host)}.json"
    versions = ", ".join(
        f"{name} {host[name]}" for name in ("torch", "transformers") if host.get(name)
    )
    return (
        f"`{found['command']}`: {device}, {versions}, Python {host['python']}, commit "
        f"{host['commit']}, median of {found['repeats']} rounds taken in turn"
        f"{results.busy(found)}; all samples in [{file}]({file})."
    )


def _speedup(case: dict[str, Any], ours: str, peer: str) -> dict[str, float]:
    for ratio in case["ratios"]:
        if (ratio["ours"], ratio["peer"]) == (ours, peer):
            return dict(ratio["speedup"])
    raise InputError(f"figures: {case['name']} holds no ratio of {ours} to {peer}")


def _with_spread(times: dict[str, float]) -> str:
    return f"{times['median']:.2f} ({times['lowest']:.2f} to {times['highest']:.2f})"


def main(arguments: Sequence[str]) -> int:
    """Write the pages' blocks and the pictures; with --check 1 where a page differs."""
    parser = argparse.ArgumentParser(prog="fastbert bench figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    given = parser.parse_args(arguments)
    changed = []
    for page in PAGES:
        path = ROOT / page
        if not path.is_file():
            raise InputError(f"{page}: is not there: start this in a checkout")
        text = path.read_text(encoding="utf-8")
        new = written(text, ROOT, page)
        if new != text:
            changed.append(str(page))
            if not given.check:
                with atomic_write(path) as file:
                    file.write(new)
    if given.check:
        print("\n".join(f"{page}: figures are not those of {RESULTS}" for page in changed))
        return 1 if changed else 0
    from fastbert.bench.page import pictures

    files = [path for path in sorted((ROOT / RESULTS).glob(f"*-{CLASS}.json")) if _is_ours(path)]
    drawn = pictures([results.read(path) for path in files], ROOT / PICTURES)
    print(f"{', '.join(changed) or 'no page'} changed; {len(drawn)} pictures in {PICTURES}")
    return 0


def _is_ours(path: Path) -> bool:
    """Whether a result file is of the registry's form; some suites have their own."""
    try:
        results.read(path)
    except InputError:
        return False
    return True
