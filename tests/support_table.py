"""The README's table of families and models, from the tests that passed.

`python tests/support_table.py` runs the tests of values and gradients and prints the table;
`--write` puts it into README.md between its two marks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- support table: make support-table -->", "<!-- end of support table -->"
# which test says what of a family's model
TESTS = {
    "test_families.py": ("test_values_and_gradients_are_those_of_transformers", "own"),
    "test_dropin.py": ("test_values_and_gradients_are_the_stock_model_s", "accelerated"),
}
_NODE = re.compile(r"(test_\w+\.py)::(\w+)\[([\w-]+)-(Bert\w+)\]$")

Cell = tuple[str, str, str]


class Outcomes:
    """A pytest plugin that notes which cells passed."""

    def __init__(self) -> None:
        self.passed: set[Cell] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        found = _NODE.search(report.nodeid)
        if not found or report.when != "call" or report.outcome != "passed":
            return
        file, test, family, model = found.groups()
        if TESTS.get(file, ("", ""))[0] == test:
            self.passed.add((family, model, TESTS[file][1]))


def table(cells: Collection[Cell], families: Collection[str], models: Collection[str]) -> str:
    """Markdown: a row a family, a column a model; which of "own" and "accelerated" hold."""
    shown = [model.removeprefix("BertFor") for model in models]
    rows = [["", *shown], ["---"] * (len(shown) + 1)]
    for family in families:
        kinds = [[k for k in ("own", "accelerated") if (family, m, k) in cells] for m in models]
        rows.append([family, *(", ".join(kind) or "-" for kind in kinds)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def columns(families: Iterable[Any]) -> list[str]:
    """Every model that some family has, in the order they are met."""
    return list(dict.fromkeys(model for family in families for model in family.heads))


def within(text: str) -> str:
    """The table that stands in a README."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main(arguments: list[str]) -> int:
    """Exit status 1 where a test failed."""
    import pytest

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    outcomes = Outcomes()
    files = [str(ROOT / "tests" / name) for name in TESTS]
    status = int(pytest.main(["-q", "-k", "values_and_gradients", *files], plugins=[outcomes]))
    from fastbert.families import FAMILIES

    made = table(outcomes.passed, FAMILIES, columns(FAMILIES.values()))
    print(made)
    if "--write" in arguments and not status:
        text = README.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        README.write_text(
            f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
