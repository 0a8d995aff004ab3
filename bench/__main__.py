"""`python -m fastbert.bench NAME`: measurements that print machine, versions and ratios."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastbert.errors import InputError
from fastbert.threads import ask_for_large_pages, sleep_soon

# name -> module with `main(arguments) -> exit status`, and what it measures
COMMANDS = {
    "train-step": ("fastbert.bench.train_step", "one optimiser step beside transformers"),
    "encode": ("fastbert.bench.encode", "texts to vectors beside sentence-transformers and ONNX"),
    "layer": ("fastbert.bench.layer", "one encoder layer beside its peers"),
    "packing": ("fastbert.bench.packing", "how full batches are, over distributions of lengths"),
    "sweep": (
        "fastbert.bench.sweep",
        "a step's cost against padding, length, batch, hidden, words",
    ),
    "pretrain": ("fastbert.bench.pretrain", "minutes of real pre-training beside transformers"),
    "finetune": ("fastbert.bench.finetune", "fine-tuning on real labels beside transformers"),
    "ablation": ("fastbert.bench.ablation", "the step with one technique switched off at a time"),
    "breakdown": ("fastbert.bench.breakdown", "where a step's time goes, by kind of work"),
    "all": ("fastbert.bench.every", "every suite; --quick within two minutes"),
    "compare": ("fastbert.bench.compare", "what changed between two result files"),
    "check": ("fastbert.bench.check", "this machine's committed ratios, measured again"),
    "gates": (
        "fastbert.bench.gates",
        "kernels, bytes, packing, registers: no worse than committed",
    ),
    "figures": ("fastbert.bench.figures", "README's figures and charts from committed results"),
    "page": ("fastbert.bench.page", "charts of result files, and one HTML page of them"),
    "loader": ("fastbert.bench.loader", "preparing text, and batches out of shards"),
    "parity": ("fastbert.bench.model_parity", "a model folder beside transformers"),
    "drop-in": ("fastbert.bench.drop_in", "stock transformers beside accelerated, on real text"),
    "validate": ("fastbert.bench.validate", "every kernel against fp64; --compile without a GPU"),
    "kernels": ("fastbert.bench.kernels", "each operator beside its peers"),
    "masked-lm": ("fastbert.bench.masked_lm", "the masked-LM loss beside its peers"),
    "attention": ("fastbert.bench.attention", "attention beside its peers, on a GPU"),
    "tasks": ("fastbert.bench.tasks", "what fine-tuning reaches on public data; docs/results.md"),
    "tune": ("fastbert.bench.tune", "launch configurations for this GPU"),
    "activations": ("fastbert.bench.activations", "bytes a layer keeps, a token"),
    "gpu-step": ("fastbert.bench.gpu_step", "a training step of base and large, on a GPU"),
    "gpu-bench": ("fastbert.bench.gpu_bench", "gpu-step and kernels, within nine minutes"),
    "gpu-test": ("fastbert.bench.gpu_test", "everything that needs a GPU, in one go"),
}
PROGRAM = "fastbert.bench"


def usage() -> str:
    """The list of commands."""
    rows = [f"  {name:<16}{what}" for name, (_, what) in COMMANDS.items()]
    lines = [f"usage: python -m {PROGRAM} NAME [options]", "", *rows, "", "NAME -h: its options"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 measured, 1 a row was refused, 2 the caller's mistake."""
    sleep_soon()
    ask_for_large_pages()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    name = arguments[0] if arguments else None
    try:
        if name is None or name not in COMMANDS:
            found = "no name" if name is None else repr(name)
            raise InputError(f"expected one of {', '.join(COMMANDS)}, got {found}")
        module = importlib.import_module(COMMANDS[name][0])
        return int(module.main(arguments[1:]))
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
