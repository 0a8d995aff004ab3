"""`fastbert finetune`, `predict` and `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.commands.flags import add_doc_sep, add_fields, command, from_flags
from fastbert.errors import InputError


def add_finetune(commands: Any) -> None:
    """One sub-command a task."""
    from fastbert.tasks.registry import TASKS, task_class
    from fastbert.training.finetune_config import FinetuneConfig

    parser = commands.add_parser("finetune", help="train a pre-trained model on a task")
    tasks = parser.add_subparsers(metavar="TASK", required=True)
    for name in TASKS:
        task = task_class(name)
        own = command(tasks, name, _finetune, task.summary)
        own.set_defaults(task=name)
        add_fields(own, FinetuneConfig)
        add_fields(own.add_argument_group("this task"), task)


def _finetune(given: argparse.Namespace) -> None:
    from fastbert.tasks.registry import task_class
    from fastbert.training.finetune_config import FinetuneConfig
    from fastbert.training.seeds import finetune_seeds

    finetune_seeds(from_flags(task_class(given.task), given), from_flags(FinetuneConfig, given))


def add_predict(commands: Any) -> None:
    """Answers line by line."""
    parser = command(
        commands, "predict", _predict, "a model's answers to standard input, or to files"
    )
    parser.add_argument("--model", required=True, help="a run of finetune, or its model folder")
    parser.add_argument(
        "files", nargs="*", help="one text a line, or .jsonl; standard input where none"
    )
    parser.add_argument("--json", action="store_true", help="answer by a JSON object a line")
    parser.add_argument(
        "--token-budget", type=int, default=4096, help="tokens a batch (%(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")


def _predict(given: argparse.Namespace) -> None:
    from fastbert.tasks.predict import predict
    from fastbert.training.loop import compute_dtype, default_device

    _refuse_budget(given.token_budget)
    predict(
        given.model,
        given.files,
        as_json=given.json,
        dtype=compute_dtype(given.dtype, default_device()),
        token_budget=given.token_budget,
    )


def add_embed(commands: Any) -> None:
    """Vectors of texts."""
    parser = command(commands, "embed", _embed, "vectors of texts: a .npy file, and their ids")
    parser.add_argument("files", nargs="+", help="one text a line, or .jsonl with text and id")
    parser.add_argument("--model", required=True, help="a run of finetune embed, or such a folder")
    parser.add_argument("--out", required=True, help="a new .npy file")
    parser.add_argument(
        "--token-budget", type=int, default=4096, help="tokens a batch (%(default)s)"
    )
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")


def _embed(given: argparse.Namespace) -> None:
    from fastbert.tasks.vectors import embed_files
    from fastbert.training.loop import compute_dtype, default_device

    _refuse_budget(given.token_budget)
    device = default_device()
    embed_files(
        given.model,
        given.files,
        given.out,
        device=device,
        dtype=compute_dtype(given.dtype, device),
        token_budget=given.token_budget,
    )


def add_evaluate(commands: Any) -> None:
    """Scores of pre-trained models on text, of fine-tuned ones on labelled examples."""
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "scores: of a fine-tuned model on labelled examples, of a pre-trained one on text",
    )
    parser.add_argument("sources", nargs="+", help="labelled examples; or files, globs of text")
    parser.add_argument("--model", required=True, help="a run, or its model folder")
    parser.add_argument("--out", help="folder for errors.jsonl, scores.json and confusion.png")
    parser.add_argument("--encoding", help="of labelled examples (utf-8)")
    parser.add_argument("--max-seq-len", type=int, help="tokens a sequence of text (the model's)")
    parser.add_argument("--objective", help="of text, such as mlm+sop (the model's)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32 or bf16")
    add_doc_sep(parser)


def _evaluate(given: argparse.Namespace) -> None:
    from fastbert.tasks.saved import is_task_folder

    if is_task_folder(given.model):
        from fastbert.training.task_evaluation import evaluate_task

        _refuse(given, _OF_TEXT, "pre-trained models on text; this one was fine-tuned")
        for line in evaluate_task(
            given.model,
            given.sources,
            dtype=given.dtype,
            out=given.out,
            encoding=given.encoding or "utf-8",
        ):
            print(line)
        return
    _refuse(given, _OF_EXAMPLES, "fine-tuned models; this one was pre-trained")
    from fastbert.training.evaluation import evaluate_text

    figures = evaluate_text(
        given.model,
        given.sources,
        doc_sep=given.doc_sep,
        objective=given.objective,
        max_seq_len=given.max_seq_len,
        dtype=given.dtype,
    )
    for name, value in figures.items():
        print(f"{name:<16} {value:.4f}")


_OF_TEXT: dict[str, str | None] = {"max_seq_len": None, "objective": None, "doc_sep": "auto"}
_OF_EXAMPLES: dict[str, str | None] = {"out": None, "encoding": None}


def _refuse_budget(tokens: int) -> None:
    if tokens < 1:
        raise InputError(f"--token-budget must be at least 1, got {tokens}")


def _refuse(given: argparse.Namespace, flags: dict[str, str | None], whose: str) -> None:
    """A flag that would not be looked at is an error."""
    for name, default in flags.items():
        if getattr(given, name) != default:
            raise InputError(f"--{name.replace('_', '-')} is for {whose}")
