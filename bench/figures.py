"""`fastbert bench figures`: README's figures, charts and the page, from committed result files.

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` in README.md and
docs/performance.md is written from bench/results, so that no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastbert.bench import machine, own_figures, results
from fastbert.bench.own_figures import with_spread
from fastbert.bench.page import CALLED, pictures
from fastbert.errors import InputError
from fastbert.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURES = Path("bench/results"), Path("docs/pictures")
PAGES = (Path("README.md"), Path("docs/performance.md"))
# the machine that README speaks of
CLASS = "cpu-avx512_bf16"
# no charts are drawn of a file of its own form, nor where tables say enough
WITHOUT_PICTURES = ("parity", "drop-in", "loader", "layer")
COMMANDS = {
    "parity": "fastbert parity MODEL",
    "loader": "fastbert bench loader TEXT --tokenizer FOLDER",
}
LINK = re.compile(r"\]\(((?:bench|docs)/[^)]+)\)")
BLOCK = re.compile(r"<!-- figures: ([a-z-]+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)


def load(root: Path, suite: str) -> dict[str, Any]:
    """The committed run of a suite."""
    return results.read(root / result_file(suite))


def written(text: str, root: Path, page: Path = PAGES[0]) -> str:
    """A page's text with every block made anew; links begin where the page lies.

    Raises:
        InputError: a block of a name that nobody makes.
    """

    def block(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in BLOCKS:
            raise InputError(f"figures: no block {name!r}; there are {', '.join(BLOCKS)}")
        suite, make = BLOCKS[name]
        if result_file(suite).as_posix() in committed(root):
            made = LINK.sub(lambda link: f"]({_from(page, link.group(1))})", make(root))
        else:
            made = (
                f"Not measured yet: `{_command(suite)} --json {result_file(suite)}`, then "
                "`make figures`."
            )
        return f"<!-- figures: {name} -->\n{made}\n<!-- end of figures -->"

    return BLOCK.sub(block, text)


def _command(suite: str) -> str:
    return COMMANDS.get(suite, f"fastbert bench {suite}")


def result_file(suite: str) -> Path:
    """Where a suite's committed run lies."""
    return RESULTS / f"{suite}-{CLASS}.json"


def committed(root: Path) -> set[str]:
    """The result files that are there, from the root."""
    return {path.relative_to(root).as_posix() for path in (root / RESULTS).glob("*.json")}


def _from(page: Path, target: str) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def picture(root: Path, name: str, said: str) -> list[str]:
    """A line that shows a picture; none where its result has none."""
    file = PICTURES / f"{name}.svg"
    return [f"![{said}]({file.as_posix()})"] if (root / file).is_file() else []


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
        f"{results.busy(found)}.\n\n"
        + "\n".join(picture(root, "train-step-0", "One training step beside transformers"))
    )


def train_step(root: Path) -> str:
    """The table of the training step."""
    found = load(root, "train-step")
    return "\n\n".join([*map(_rows_table, found["cases"]), _source(found)])


def encode(root: Path) -> str:
    """The table of texts to vectors, and ours beside the fastest peer that is as accurate."""
    found = load(root, "encode")
    shown = picture(root, "encode-0", "Encoding beside sentence-transformers and ONNX Runtime")
    return "\n\n".join(
        [
            *map(_rows_table, found["cases"]),
            *(line for case in found["cases"] if (line := _fastest(case))),
            *shown,
            _source(found),
        ]
    )


def _fastest(case: dict[str, Any]) -> str:
    """A line: ours in bf16 beside the fastest of theirs; int8 is less accurate. Empty where no
    peer was measured."""
    theirs = [
        row
        for row in case["rows"]
        if row["status"] == "measured"
        and row["dtype"] != "int8"
        and not row["provider"].startswith("fastbert")
        and not row["provider"].endswith("accelerated")
    ]
    if not theirs:
        return ""
    peer = results.label(min(theirs, key=lambda row: row["ms"]["median"]))
    times = with_spread(_speedup(case, "fastbert bf16", peer))
    return (
        f"In bf16 ours is {times} times as fast as the fastest of theirs in fp32 or bf16, {peer}."
    )


def layer(root: Path) -> str:
    """One encoder layer, compiled too where that was measured."""
    found = load(root, "layer")
    return "\n\n".join([*map(_rows_table, found["cases"]), _source(found)])


def breakdown(root: Path) -> str:
    """Where a step goes, a picture a dtype."""
    found = load(root, "breakdown")
    shown = [
        line
        for number in range(len(found["cases"]))
        for line in picture(root, f"breakdown-{number}", "Where a step's time goes")
    ]
    return "\n\n".join([*shown, _source(found)])


def roofline(root: Path) -> str:
    """Our operators below the ceilings."""
    found = load(root, "kernels")
    shown = picture(root, "roofline", "Our operators below the machine's measured ceilings")
    return "\n\n".join([*shown, _source(found)])


def padding(root: Path) -> str:
    """Speed-up against padding, as a table."""
    found = load(root, "sweep")
    lines = ["| padding in the peer's batch | times as fast (by round) |", "|---|---|"]
    for case in found["cases"]:
        if case["conditions"]["quantity"] != "padding":
            continue
        times = _speedup(case, "fastbert bf16", "transformers bf16")
        lines.append(f"| {case['conditions']['value']:g} % | {with_spread(times)} |")
    shown = picture(root, "sweep-padding", "Speed-up against the share of padding")
    return "\n\n".join(["\n".join(lines), *shown, _source(found)])


def growth(root: Path) -> str:
    """What a thousand tokens cost as a quantity grows, ours and theirs, as a table."""
    found = load(root, "sweep")
    lines = [
        "| quantity | value | fastbert, ms a thousand tokens | transformers | times as fast |",
        "|---|---|---|---|---|",
    ]
    shown = []
    for case in found["cases"]:
        quantity, value = case["conditions"]["quantity"], case["conditions"]["value"]
        if quantity == "padding":
            continue
        cost = {}
        for row in case["rows"]:
            measured = row["status"] == "measured"
            cost[row["provider"]] = (
                f"{1e6 / row['real_tokens_per_s']:,.0f}" if measured else row["reason"]
            )
        by = [r["speedup"] for r in case["ratios"] if r["peer"].startswith("transformers")]
        cells = [quantity, f"{value:,g}", cost["fastbert"], cost["transformers"]]
        lines.append(f"| {' | '.join(cells)} | {with_spread(by[0]) if by else ''} |")
        said = f"Cost against {CALLED.get(quantity, quantity)}"
        shown += picture(root, f"sweep-{quantity}", said)
    return "\n\n".join(["\n".join(lines), *dict.fromkeys(shown), _source(found)])


def real_training(suite: str) -> Callable[[Path], str]:
    """The table of a suite that trains on real text, with what was learned in it."""

    def made(root: Path) -> str:
        found = load(root, suite)
        tables = map(_rows_table, found["cases"])
        shown = picture(root, f"{suite}-0", "Both sides on the same batches")
        return "\n\n".join([*tables, *shown, _source(found, "steps")])

    return made


def ablation(root: Path) -> str:
    """What each technique bought, as a table."""
    found = load(root, "ablation")
    lines = ["| without | dtype | ms | the whole is faster by |", "|---|---|---|---|"]
    for case in found["cases"]:
        for row in case["rows"]:
            if row["status"] != "measured":
                name = row["provider"].removeprefix("without ")
                lines.append(f"| {name} | {row['dtype']} | {row['reason']} | |")
                continue
            by = "" if row["provider"] == "fastbert" else with_spread(
                _speedup(case, f"fastbert {row['dtype']}", results.label(row))
            )  # fmt: skip
            name = row["provider"].removeprefix("without ").replace("fastbert", "nothing")
            lines.append(f"| {name} | {row['dtype']} | {row['ms']['median']:,.0f} | {by} |")
    shown = picture(root, "ablation-0", "The step with one technique off at a time")
    return "\n\n".join(["\n".join(lines), *shown, _source(found)])


def own(name: str, make: Callable[[dict[str, Any], str], str]) -> Callable[[Path], str]:
    """A block from a file that has a form of its own."""

    def made(root: Path) -> str:
        file = result_file(name)
        return make(json.loads((root / file).read_text(encoding="utf-8")), file.as_posix())

    return made


# by name, the suite whose run it reads, and who writes it
BLOCKS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "headline": ("train-step", headline),
    "train-step": ("train-step", train_step),
    "encode": ("encode", encode),
    "padding": ("sweep", padding),
    "ablation": ("ablation", ablation),
    "breakdown": ("breakdown", breakdown),
    "layer": ("layer", layer),
    "roofline": ("kernels", roofline),
    "exactness": ("parity", own("parity", own_figures.exactness)),
    "drop-in": ("drop-in", own("drop-in", own_figures.drop_in)),
    "growth": ("sweep", growth),
    "pretrain": ("pretrain", real_training("pretrain")),
    "finetune": ("finetune", real_training("finetune")),
    "loader": ("loader", own("loader", own_figures.loader)),
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
        cells.append("" if ratio is None else with_spread(ratio["speedup"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _source(found: dict[str, Any], rounds: str = "rounds") -> str:
    host = found["machine"]
    device = host.get("gpu") or f"{host['cpu']} with {host['cpu_class']}, {host['threads']} threads"
    file = RESULTS / f"{found['bench']}-{machine.machine_class(host)}.json"
    versions = ", ".join(
        f"{name} {host[name]}" for name in ("torch", "transformers") if host.get(name)
    )
    return (
        f"`{found['command']}`: {device}, {versions}, Python {host['python']}, commit "
        f"{host['commit']}, median of {found['repeats']} {rounds} taken in turn"
        f"{results.busy(found)}; all samples in [{file}]({file})."
    )


def _speedup(case: dict[str, Any], ours: str, peer: str) -> dict[str, float]:
    for ratio in case["ratios"]:
        if (ratio["ours"], ratio["peer"]) == (ours, peer):
            return dict(ratio["speedup"])
    raise InputError(f"figures: {case['name']} holds no ratio of {ours} to {peer}")


def main(arguments: Sequence[str]) -> int:
    """Write the pages' blocks and the pictures; with --check 1 where a page differs."""
    parser = argparse.ArgumentParser(prog="fastbert bench figures", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one differs")
    given = parser.parse_args(arguments)
    drawn = []
    if not given.check:
        # the pages show those that are there
        drawn = pictures([load(ROOT, suite) for suite in _measured(ROOT)], ROOT / PICTURES)
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
    print(f"{', '.join(changed) or 'no page'} changed; {len(drawn)} pictures in {PICTURES}")
    return 0


def _measured(root: Path) -> list[str]:
    """The suites of the blocks whose runs are committed and have charts."""
    suites = dict.fromkeys(suite for suite, _ in BLOCKS.values())
    drawn = (suite for suite in suites if suite not in WITHOUT_PICTURES)
    return [suite for suite in drawn if (root / result_file(suite)).is_file()]
