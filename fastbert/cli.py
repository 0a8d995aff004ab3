"""The `fastbert` command. Each sub-command parses its flags and calls one function."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastbert import __version__
from fastbert.commands import pretrain, tasks
from fastbert.commands.flags import add_doc_sep, command
from fastbert.errors import InputError
from fastbert.threads import ask_for_large_pages, sleep_soon


class _Parser(argparse.ArgumentParser):
    """A mistake in the flags is one line, like any other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what is accepted)")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
# commands of fastbert.bench, which reads their flags itself
BENCH = {
    "validate": "every kernel against fp64 on this machine; --compile needs no GPU",
    "parity": "a model folder computed by us and by transformers: differences a dtype",
    "tune": "measure launch configurations on this GPU",
    "bench": "measurements: train-step, encode, layer, kernels, drop-in, all; alone it lists them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None for the process's own.

    Returns:
        The exit status: 0, or 2 after bad input, which is explained in one line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sleep_soon()
    ask_for_large_pages()
    try:
        if words[:1] and words[0] in BENCH:
            return _bench(words)
        given = _parser().parse_args(words, argparse.Namespace(words=words))
        given.handler(given)
    except InputError as error:
        print(f"fastbert: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # the reader has gone, as `head` does; nothing is left to say, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # what no reader or writer has put in its own words: a folder one may not look into, say
        where = f"{error.filename}: " if error.filename else ""
        print(f"fastbert: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastbert: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastbert", description="Train, fine-tune and use BERT without computing padding."
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_corpus,
        _add_tokenizer,
        _add_prepare,
        pretrain.add_pretrain,
        pretrain.add_average,
        tasks.add_finetune,
        tasks.add_predict,
        _add_fill_mask,
        tasks.add_embed,
        tasks.add_evaluate,
        _add_report,
        _add_doctor,
    ):
        add(commands)
    for name, summary in BENCH.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _bench(words: list[str]) -> int:
    from fastbert.bench.__main__ import main as bench

    return bench(words[1:] if words[0] == "bench" else words)


def _add_demo(commands: Any) -> None:
    parser = command(
        commands, "demo", _demo, "the whole way on this machine: text, vocabulary, BERT, classifier"
    )
    parser.add_argument("--out", default="runs/demo", help="folder of the run (%(default)s)")
    parser.add_argument("--minutes", type=float, default=4.0, help="of pre-training (%(default)s)")
    parser.add_argument("--size", default="mini", help="tiny to large (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="replace an earlier demo in --out")


def _demo(given: argparse.Namespace) -> None:
    from fastbert.demo import run_demo

    run_demo(given.out, given.minutes, size=given.size, seed=given.seed, fresh=given.fresh)


def _add_corpus(commands: Any) -> None:
    parser = command(commands, "corpus", _corpus, "write text that every machine has")
    parser.add_argument("kind", choices=["python-docs"], help="docstrings of installed libraries")
    parser.add_argument("--out", required=True, help="a .jsonl file: text, label, module, name")


def _corpus(given: argparse.Namespace) -> None:
    from fastbert.data.python_docs import collect, write_jsonl

    out = Path(given.out)
    if out.exists() or not out.parent.is_dir():
        raise InputError(f"--out {out}: name a new file in a folder that exists")
    docs = collect()
    write_jsonl(docs, out)
    words = sum(len(doc.text.split()) for doc in docs)
    print(f"{given.out}: {len(docs):,} docstrings, {words:,} words")


def _add_tokenizer(commands: Any) -> None:
    parser = commands.add_parser("tokenizer", help="train a WordPiece vocabulary")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    train = command(actions, "train", _train_tokenizer, "train a WordPiece vocabulary on text")
    train.add_argument("sources", nargs="+", help="files, globs or folders of text")
    train.add_argument("--vocab-size", type=int, default=30522, help="(%(default)s)")
    train.add_argument("--cased", action="store_true", help="keep capitals and accents")
    train.add_argument("--out", required=True, help="folder for tokenizer.json and vocab.txt")
    add_doc_sep(train)


def _train_tokenizer(given: argparse.Namespace) -> None:
    from fastbert.data.corpus import read_documents
    from fastbert.tokenizer import train_tokenizer

    out = Path(given.out)
    if out.exists() and (
        not out.is_dir() or any((out / name).exists() for name in TOKENIZER_FILES)
    ):
        raise InputError(f"--out {out}: holds a tokenizer already, or is no folder; name a new one")
    if given.vocab_size < 1:
        raise InputError(f"--vocab-size must be at least 1, got {given.vocab_size}")
    documents = read_documents(given.sources, doc_sep=given.doc_sep)
    tokenizer = train_tokenizer(
        (document.text for document in documents),
        given.vocab_size,
        lowercase=not given.cased,
        progress=sys.stderr.isatty(),
    )
    tokenizer.save_pretrained(given.out)
    print(f"{given.out}: vocabulary of {tokenizer.vocab_size:,}")


def _add_prepare(commands: Any) -> None:
    from fastbert.data.prepare import SHARD_TOKENS

    parser = command(
        commands, "prepare", _prepare, "text to token shards, on all cores; goes on after a kill"
    )
    parser.add_argument("sources", nargs="+", help="files, globs, folders, or hf:NAME")
    parser.add_argument("--tokenizer", required=True, help="folder or file of the vocabulary")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--workers", type=int, help="processes (one a core)")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="of one shard (%(default)s)"
    )
    add_doc_sep(parser)


def _prepare(given: argparse.Namespace) -> None:
    from fastbert.data.prepare import prepare
    from fastbert.tokenizer import Tokenizer

    prepare(
        given.sources,
        Tokenizer.from_pretrained(given.tokenizer),
        given.out,
        doc_sep=given.doc_sep,
        workers=given.workers,
        shard_tokens=given.shard_tokens,
    )


def _add_fill_mask(commands: Any) -> None:
    parser = command(commands, "fill-mask", _fill_mask, "the likeliest words for [MASK]")
    parser.add_argument("texts", nargs="+", help='such as "The whale [MASK] beneath the ship."')
    parser.add_argument("--model", required=True, help="a run of pretrain, or its model folder")
    parser.add_argument("--top", type=int, default=5, help="words a blank (%(default)s)")


def _fill_mask(given: argparse.Namespace) -> None:
    from fastbert.models import BertForMaskedLM, resolve_model
    from fastbert.tasks.fill_mask import fill_mask
    from fastbert.tokenizer import Tokenizer

    folder = resolve_model(given.model)
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    for text, blanks in zip(
        given.texts, fill_mask(model, tokenizer, given.texts, given.top), strict=True
    ):
        print(text)
        for blank in blanks:
            print("  " + "  ".join(f"{word} {share:.1%}" for word, share in blank.words))


def _add_report(commands: Any) -> None:
    parser = command(commands, "report", _report, "several runs side by side, in one picture")
    parser.add_argument("runs", nargs="+", help="folders of runs, finished or not")
    parser.add_argument("--picture", help="a new .png: loss over tokens and over minutes")


def _report(given: argparse.Namespace) -> None:
    from fastbert.training.report import compare_runs

    print("\n".join(compare_runs(given.runs, given.picture)))


def _add_doctor(commands: Any) -> None:
    command(commands, "doctor", _doctor, "versions, devices, which path runs and why")


def _doctor(given: argparse.Namespace) -> None:
    from fastbert.doctor import diagnose

    print("\n".join(diagnose()))


if __name__ == "__main__":
    sys.exit(main())
