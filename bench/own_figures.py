"""Figures from result files that have a form of their own: parity, drop-in and loader.

Each function takes what the file holds and its name, and returns what stands on the page.
"""

from __future__ import annotations

from typing import Any

from fastbert.bench.drop_in_text import ORDERS

SIDES = ("ours", "theirs")
TOLD = {"stock": "stock", "fast": "accelerated"}


def with_spread(times: dict[str, float]) -> str:
    """A ratio, and the lowest and the highest of a round."""
    return f"{times['median']:.2f} ({times['lowest']:.2f} to {times['highest']:.2f})"


def exactness(found: dict[str, Any], file: str) -> str:
    """A model's hidden states beside transformers'."""
    lines = [
        "| | largest difference | least cosine | largest error, ours | transformers' "
        "| rms error, ours | transformers' |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        errors = [f"{row[f'{who}_{kind}_error']:.1e}" for kind in ("max", "rms") for who in SIDES]
        difference, cosine = f"{row['max_difference']:.1e}", f"{row['least_cosine']:.7f}"
        lines.append(f"| {' | '.join([row['dtype'], difference, cosine, *errors])} |")
    said = _source(found, f"`fastbert parity` of {found['model']}", file)
    return "\n".join([*lines, "", said])


def drop_in(found: dict[str, Any], file: str) -> str:
    """Real tokens a second of every side, and what acceleration gains."""
    sides = [(name, order) for name in TOLD for order in ORDERS]
    titles = [TOLD[name] + (", sorted" if order == "sorted" else "") for name, order in sides]
    lines = ["| real tokens/s | " + " | ".join(titles) + " |", "|---" * (1 + len(sides)) + "|"]
    for task, of_task in found["tasks"].items():
        rows = {
            (row["name"], row["order"], row["dtype"]): row["real_tokens_per_s"]
            for row in of_task["rows"]
        }
        for dtype in dict.fromkeys(row["dtype"] for row in of_task["rows"]):
            cells = [f"{rows[name, order, dtype]:,}" for name, order in sides]
            lines.append(f"| {task}, {dtype} | " + " | ".join(cells) + " |")
    lines.append("")
    for task, of_task in found["tasks"].items():
        ratios = {(ratio["ours"], ratio["peer"]): ratio["speedup"] for ratio in of_task["ratios"]}
        told = []
        for dtype in ("bf16", "fp32"):
            gain = ratios["fast bf16 unsorted", f"stock {dtype} sorted"]
            between = f"{gain['lowest']:.2f} to {gain['highest']:.2f} by round"
            told.append(f"{gain['median']:.2f}x stock {dtype} sorted ({between})")
        lines.append(f"- {task}: accelerated bf16, in the text's order, is {' and '.join(told)}.")
    rounds = f"`fastbert bench drop-in`, {found['repeats']} rounds taken in turn"
    return "\n".join([*lines, "", _source(found, rounds, file)])


def loader(found: dict[str, Any], file: str) -> str:
    """What text costs before the step."""
    text, prepared = found["text"], found["prepare"]
    lines = [
        f"Preparing {text['megabytes']:g} MB of text, {text['tokens']:,} tokens, takes "
        f"{with_spread(prepared['ratio'])} times as long as tokenising alone with `tokenizers`, "
        f"and {with_spread(prepared['cpu_ratio'])} times its processor time.",
        "",
        "| tokens a batch | longest | objective | room filled | tokens/s | by workers "
        "| a second of the processor |",
        "|---|---|---|---|---|---|---|",
    ]
    workers = f"tokens_per_s_{found['cores']}_workers"
    for row in found["batches"]:
        rates = [row[n]["median"] for n in ("tokens_per_s_0_workers", workers, "tokens_per_cpu_s")]
        cells = [f"{row['budget']:,}", str(row["max_seq_len"]), row["objective"]]
        cells += [f"{row['full']:.2%}", *(f"{rate:,.0f}" for rate in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    command = "`fastbert bench loader TEXT --tokenizer FOLDER`"
    return "\n".join([*lines, "", _source(found, command, file)])


def _source(found: dict[str, Any], said: str, file: str) -> str:
    host = found["machine"]
    return (
        f"{said}: {host['cpu']} with {host['cpu_class']}, {host['cores']} cores, "
        f"torch {host['torch']}, transformers {host['transformers']}, commit {host['commit']}; "
        f"[{file}]({file})."
    )
