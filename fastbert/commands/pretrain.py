"""`fastbert pretrain` and `fastbert average`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

from fastbert.commands.flags import add_doc_sep, add_fields, command
from fastbert.errors import InputError

# what time cannot decide, since batches are a function of the step
_BY_STEPS: dict[str, Any] = {"first_seq_len": None, "first_accumulation": None, "ramp_share": 0.0}


def add_pretrain(commands: Any) -> None:
    """Pre-train an encoder."""
    from fastbert.training.presets import PRESETS
    from fastbert.training.pretrain import PretrainConfig

    parser = command(commands, "pretrain", _pretrain, "pre-train an encoder on text")
    parser.add_argument(
        "sources", nargs="+", help="a folder of shards, or files, globs, folders of text"
    )
    parser.add_argument("--tokenizer", required=True, help="folder or file of the vocabulary")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--preset", help="published settings, which other flags change: " + ", ".join(PRESETS)
    )
    parser.add_argument(
        "--budget", help="time (10m, 4h) or tokens (30M, 3B); warm-up and decay follow"
    )
    add_doc_sep(parser)
    add_fields(parser, PretrainConfig, given_alone=True)


def _pretrain(given: argparse.Namespace) -> None:
    from fastbert.training.parallel import is_first_process
    from fastbert.training.pretrain import pretrain

    report = pretrain(
        given.sources,
        given.tokenizer,
        pretrain_config(given),
        doc_sep=given.doc_sep,
        resume=given.resume,
    )
    if not report and is_first_process():
        more = [] if given.resume else ["--resume"]
        print("    " + shlex.join(["fastbert", *given.words, *more]))


def pretrain_config(given: argparse.Namespace) -> Any:
    """The preset, changed by the flags that were given, ended by the budget."""
    from fastbert.training.presets import preset
    from fastbert.training.pretrain import PretrainConfig
    from fastbert.training.schedule import parse_budget

    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    flags = {name: value for name, value in vars(given).items() if name in names}
    chosen = preset(given.preset) if given.preset is not None else None
    config = PretrainConfig(**{**(chosen.fields if chosen else {}), **flags})
    if given.budget is not None:
        if config.max_steps is not None or config.max_minutes is not None:
            raise InputError("--budget: give it, or --max-steps or --max-minutes")
        budget = parse_budget(given.budget, config.tokens_a_step)
        config = dataclasses.replace(
            config, max_steps=budget.max_steps, max_minutes=budget.max_minutes
        )
    elif chosen and config.max_steps is None and config.max_minutes is None:
        config = dataclasses.replace(config, max_steps=chosen.steps)
    if chosen and config.max_steps is None:
        # a recipe that grows by steps stays at its last size where time ends the run
        kept = {name: value for name, value in _BY_STEPS.items() if name not in flags}
        config = dataclasses.replace(config, **kept)
    return config


def add_average(commands: Any) -> None:
    """The mean of several models' weights."""
    parser = command(
        commands, "average", _average, "the mean of several models, or of a run's checkpoints"
    )
    parser.add_argument(
        "models", nargs="+", help="model folders, or one run that keeps checkpoints"
    )
    parser.add_argument("--out", required=True, help="a new model folder")
    parser.add_argument(
        "--last", type=int, help="newest checkpoints of the run to take (all that are kept)"
    )


def _average(given: argparse.Namespace) -> None:
    from fastbert.training.model_average import average

    count = average(given.models, given.out, last=given.last)
    print(f"{given.out}: the mean of {count}")
