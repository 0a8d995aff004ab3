"""Flags of sub-commands, derived from the fields of configurations."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

Handler = Callable[[argparse.Namespace], None]


def command(commands: Any, name: str, handler: Handler, summary: str) -> argparse.ArgumentParser:
    """A sub-command that calls `handler` with what was given."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(handler=handler)
    return parser


def add_doc_sep(parser: argparse.ArgumentParser) -> None:
    """What separates documents in text files."""
    parser.add_argument(
        "--doc-sep",
        default="auto",
        choices=["auto", "blank", "line", "file"],
        help="what separates documents in text files; the guess is printed (%(default)s)",
    )


def add_fields(
    parser: argparse._ActionsContainer, config: type, *, given_alone: bool = False
) -> None:
    """A flag for every field of a configuration; help and default come from the field.

    Where `given_alone`, flags that were not given leave no value behind.
    """
    kinds = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        kind = kinds[field.name]
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        required = field.default is dataclasses.MISSING
        default = argparse.SUPPRESS if given_alone and not required else field.default
        if kind is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, help=text, default=default
            )
            continue
        optional = isinstance(kind, types.UnionType)
        kind = typing.get_args(kind)[0] if optional else kind
        shown = "" if required or field.default is None else f" ({field.default})"
        parser.add_argument(
            flag,
            type=kind,
            required=required,
            default=None if required else default,
            help=(text + shown).replace("%", "%%"),
        )


def from_flags(config: type, given: argparse.Namespace) -> Any:
    """The configuration that the flags of `add_fields` give."""
    names = [f.name for f in dataclasses.fields(config) if "help" in f.metadata]
    return config(**{name: getattr(given, name) for name in names})
