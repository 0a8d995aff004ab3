"""The import direction, read off every source file, and what `import fastbert` may cost."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"fastbert": "fastbert", "fastbert.kernels": "kernels", "fastbert.bench": "bench"}

# a part is the first name below fastbert; each may import itself and these, anybody GROUND
GROUND = {"adapters", "errors", "files", "threads"}
FORMATS = {"family", "families", "config", "checkpoint", "packing", "outputs", "losses", "segments"}
MODULES = {"kernels", "norm", "linear", "encoder", "pre_norm", "heads", "model", "models"}
MODULES |= {"replaced_tokens"}
ENGINE = FORMATS | MODULES | {"tokenizer", "special_tokens"}
DROP_IN = {"packed_call", "stock_layers", "fast_layers", "dropin", "attention_interface"}
ABOVE = {"task_heads", "data", "metrics", "tasks", "training", "pipelines"}
LIBRARY = ENGINE | DROP_IN | ABOVE
MAY_IMPORT = {
    "fastbert": LIBRARY,
    "adapters": set(),
    "errors": set(),
    "threads": set(),
    "files": set(),
    "kernels": set(),
    "family": set(),
    "families": {"family"},
    "config": {"family", "families"},
    "packing": {"kernels", "segments"},
    "segments": set(),
    "special_tokens": set(),
    "tokenizer": {"special_tokens"},
    "outputs": {"packing"},
    "losses": {"packing", "segments"},
    "checkpoint": {"config", "family", "families"},
    "norm": set(),
    "linear": {"kernels"},
    "int8": set(),
    "encoder": {"kernels", "config", "packing", "norm", "linear"},
    "pre_norm": {"kernels", "config", "packing", "norm", "linear", "encoder"},
    "heads": {"kernels", "config", "family", "packing", "norm", "pre_norm"},
    "model": ENGINE - {"tokenizer", "special_tokens", "models", "replaced_tokens"},
    "replaced_tokens": ENGINE - {"tokenizer", "special_tokens", "models"},
    "models": ENGINE - {"tokenizer", "special_tokens"},
    "task_heads": ENGINE - {"tokenizer", "special_tokens"},
    "packed_call": {"kernels", "packing"},
    "stock_layers": {"family", "linear"},
    "fast_layers": {"kernels", "linear", "packed_call", "stock_layers", "pre_norm", "config"},
    "dropin": FORMATS | {"packed_call", "stock_layers", "fast_layers", "pre_norm"},
    "attention_interface": {"kernels", "packed_call"},
    "data": {"tokenizer", "packing"},
    "metrics": set(),
    "tasks": ENGINE | {"task_heads", "data", "metrics"},
    "training": ENGINE | {"data", "metrics", "tasks"},
    "pipelines": ENGINE | {"data", "metrics", "tasks"},
    "demo": LIBRARY | {"fastbert"},
    "doctor": LIBRARY | {"fastbert"},
    "commands": LIBRARY | {"fastbert", "demo", "doctor", "bench"},
    "cli": LIBRARY | {"fastbert", "demo", "doctor", "commands", "bench"},
    "__main__": {"cli"},
    "bench": LIBRARY | {"fastbert", "demo", "doctor", "int8"},
}
# the kernels' own doors: all that the floors above may name
KERNEL_DOORS = {"fastbert.kernels.ops"}
TOP = {"cli", "commands"}

CORE_DEPENDENCIES = {"torch", "numpy", "tokenizers", "safetensors", "tqdm"}
KERNEL_DEPENDENCIES = {"torch", "triton"}
EXTRAS = {"triton", "transformers", "matplotlib"}

IMPORT_BUDGET_S = 0.3
REPEATS = 5


@dataclass(frozen=True)
class Import:
    """One import of one file.

    Attributes:
        module: the importing module, e.g. fastbert.encoder.
        target: the imported module, resolved as far as a file of ours goes.
        at_import: runs when the module is imported, not when a function is called.
    """

    module: str
    target: str
    line: int
    at_import: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


@lru_cache
def sources() -> dict[str, Path]:
    """Every module of ours by name; the links inside fastbert/ are not followed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            within = path.relative_to(ROOT / folder)
            if folder == "fastbert" and within.parts[0] in ("kernels", "bench"):
                continue
            names = [package, *within.with_suffix("").parts]
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


@lru_cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module, path in sources().items() for found in _read(module, path))


def _read(module: str, path: Path) -> Iterator[Import]:
    inside: set[ast.AST] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(ast.walk(node))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside.update(inner for statement in node.body for inner in ast.walk(statement))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        for target in _targets(node, package):
            yield Import(module, target, node.lineno, node not in inside)


def _targets(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            name = f"{base}.{alias.name}"
            yield name if name in sources() else base


def part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def ours(target: str) -> bool:
    return target.split(".")[0] == "fastbert"


def within_kernels(module: str) -> bool:
    return part(module) == "kernels"


def cycle_in(edges: Mapping[str, set[str]]) -> list[str]:
    """The names along one cycle, first name again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(edges.get(name, ())):
                if cycle := visit(target, [*path, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in sorted(edges) if (cycle := visit(name, []))), [])


def test_the_table_has_a_row_for_every_part():
    assert {part(module) for module in sources()} <= MAY_IMPORT.keys()


def test_the_table_itself_runs_downward():
    assert cycle_in({name: allowed - {name} for name, allowed in MAY_IMPORT.items()}) == []


def test_imports_run_downward():
    wrong = [
        str(found)
        for found in imports()
        if ours(found.target)
        and part(found.target) not in {part(found.module), *MAY_IMPORT[part(found.module)]}
        and not (part(found.target) in GROUND and not within_kernels(found.module))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    edges: dict[str, set[str]] = {}
    for found in imports():
        if found.target in sources():
            edges.setdefault(found.module, set()).add(found.target)
    assert cycle_in(edges) == []


@pytest.mark.parametrize("edges", [{"a": {"a"}}, {"a": {"b"}, "b": {"c"}, "c": {"b"}}])
def test_a_cycle_is_seen(edges):
    assert cycle_in(edges)


def test_every_import_of_ours_exists():
    wrong = [
        str(found)
        for found in imports()
        if ours(found.target) and found.target not in sources() and found.target not in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_top_level_kernels_or_bench():
    wrong = [
        str(found) for found in imports() if found.target.split(".")[0] in ("kernels", "bench")
    ]
    assert not wrong, "\n".join(wrong)


def test_operators_are_reached_through_ops_alone():
    wrong = [
        str(found)
        for found in imports()
        if ours(found.target)
        and within_kernels(found.target)
        and not within_kernels(found.module)
        and part(found.module) != "bench"
        and found.target not in KERNEL_DOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_import_torch_and_their_own_files():
    wrong = [
        str(found)
        for found in imports()
        if within_kernels(found.module)
        and not ours(found.target)
        and not _allowed(found.target, KERNEL_DEPENDENCIES)
    ]
    assert not wrong, "\n".join(wrong)


def kernel_files() -> set[str]:
    """The modules that need triton when they are imported, themselves or through another."""
    files = {found.module for found in imports() if _needs(found, "triton")}
    while True:
        more = {found.module for found in imports() if found.at_import and found.target in files}
        if more <= files:
            return files
        files |= more


def test_triton_waits_until_it_is_needed():
    # a kernel file may name triton at its top if nobody above imports that file at theirs
    assert all(within_kernels(module) for module in kernel_files()), kernel_files()
    assert not kernel_files() & KERNEL_DOORS


def test_core_imports_only_its_dependencies():
    wrong = [
        str(found)
        for found in imports()
        if found.at_import
        and part(found.module) not in ("kernels", "bench")
        and not ours(found.target)
        and not _allowed(found.target, CORE_DEPENDENCIES)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_imports_bench_and_only_when_asked():
    wrong = [
        str(found)
        for found in imports()
        if ours(found.target)
        and part(found.target) == "bench"
        and part(found.module) != "bench"
        and (part(found.module) not in TOP or found.at_import)
    ]
    assert not wrong, "\n".join(wrong)


def _needs(found: Import, name: str) -> bool:
    return found.at_import and found.target.split(".")[0] == name


def _allowed(target: str, dependencies: set[str]) -> bool:
    name = target.split(".")[0]
    return name in sys.stdlib_module_names or name in dependencies


def python(program: str) -> str:
    """What the program prints, run by a fresh interpreter in the checkout."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def fresh_imports() -> list[tuple[float, set[str]]]:
    """Seconds and new top-level modules of `import fastbert`, after torch, in fresh processes."""
    # torch comes first in the same process: no difference of two noisy runs
    program = """if True:
        import sys, time, torch
        before, start = set(sys.modules), time.perf_counter()
        import fastbert
        print(time.perf_counter() - start, *set(sys.modules) - before)
    """
    printed = [python(program).split() for _ in range(REPEATS)]
    return [(float(words[0]), {word.split(".")[0] for word in words[1:]}) for words in printed]


def test_import_fastbert_is_cheap(fresh_imports):
    times_s = [seconds for seconds, _ in fresh_imports]
    assert statistics.median(times_s) <= IMPORT_BUDGET_S, times_s


def test_import_fastbert_brings_no_extra(fresh_imports):
    _, brought = fresh_imports[0]
    assert "fastbert" in brought
    assert not brought & EXTRAS


def test_everything_imports_without_the_extras():
    modules = sorted(
        module
        for module in sources()
        if module not in kernel_files()
        and part(module) != "bench"
        and not module.endswith("__main__")
    )
    program = f"""if True:
        import importlib, sys
        for name in {sorted(EXTRAS)}:
            sys.modules[name] = None
        for name in {modules}:
            importlib.import_module(name)
        print("imported")
    """
    assert python(program) == "imported\n"
