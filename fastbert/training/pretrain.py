"""Pre-training from text to a model folder in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fastbert.data.loader import Loader
from fastbert.data.stream import PretrainingStream, prefetch
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.files import locked
from fastbert.tokenizer import Tokenizer
from fastbert.training.evaluation import heldout, unigram_log_probabilities
from fastbert.training.loop import Interruption, default_device, refuse_graph
from fastbert.training.parallel import Ranks, processes_started
from fastbert.training.pretrain_config import PretrainConfig
from fastbert.training.pretrain_run import MODEL_FOLDER, REPORT_FILE, pretrain_on, write_report
from fastbert.training.pretrain_text import Source, Text
from fastbert.training.run_folder import check_run, claim_run
from fastbert.training.sharded_state import finish_writing
from fastbert.training.state import remove_checkpoints
from fastbert.training.trackers import parse_trackers

__all__ = [
    "MODEL_FOLDER",
    "REPORT_FILE",
    "PretrainConfig",
    "pretrain",
    "pretrain_corpus",
    "write_report",
]


def pretrain(
    sources: list[str],
    tokenizer_path: str,
    config: PretrainConfig,
    *,
    doc_sep: str = "auto",
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Read text, pre-train on it, and leave a model.

    Args:
        sources: a folder of shards, or text: files, globs or folders.
        tokenizer_path: folder or file of a WordPiece vocabulary.
        config: everything else.
        doc_sep: how documents are separated: auto, blank, line or file.
        resume: go on with the run in `config.out`.
        say: told what happens, a line at a time.

    Returns:
        The report, as written to `report.json`; empty where the run was interrupted.

    Raises:
        InputError: bad settings, text or files.
    """
    settings = {
        "command": "pretrain",
        "sources": sources,
        "tokenizer": tokenizer_path,
        "doc_sep": doc_sep,
        **dataclasses.asdict(config),
    }
    config.loop()
    config.stream(torch.device("cpu"))
    parse_trackers(config.log_to)
    if config.cuda_graph:
        refuse_graph(default_device(), processes_started())
    ranks = Ranks.from_environment(default_device(), sharded=config.parallel == "fsdp")
    if not ranks.first:
        say = _silent
    try:
        return _pretrain(sources, tokenizer_path, config, settings, ranks, doc_sep, resume, say)
    finally:
        with Interruption():
            ranks.close()


def _silent(line: str) -> None:
    """What the first rank says is enough."""


def _pretrain(
    sources: list[str],
    tokenizer_path: str,
    config: PretrainConfig,
    settings: dict[str, Any],
    ranks: Ranks,
    doc_sep: str,
    resume: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    if ranks.first:
        check_run(config.out, settings, resume=resume)
    finished = Path(config.out) / REPORT_FILE
    if resume and finished.is_file():
        say(f"{config.out}: the run is finished, there is nothing to resume")
        if not config.keep_checkpoints:
            remove_checkpoints(Path(config.out))
        done: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return done
    tokenizer = Tokenizer.from_pretrained(tokenizer_path)
    config.encoder(tokenizer.vocab_size)
    # the first rank prepares, the others find what it has left
    if not ranks.first:
        ranks.barrier()
    own = Source.open(sources, tokenizer, config, doc_sep, say)
    replay = None
    if config.replay is not None:
        replay = Source.open([config.replay], tokenizer, config, doc_sep, say)
    folder = Path(config.out)
    if ranks.first:
        claim_run(config.out, settings, resume=resume)
        ranks.barrier()
    stream_config = config.stream(default_device())
    named = {"": own} if replay is None else {"": own, "replay_": replay}
    text = Text(
        tokenizer,
        {name: source.scored(tokenizer, config) for name, source in named.items()},
        unigram_log_probabilities([part.corpus for part in own.parts], tokenizer.vocab_size),
        lambda state: Loader(
            own.parts,
            tokenizer,
            stream_config,
            state.position,
            step=state.groups,
            curriculum=config.curriculum(),
            rank=ranks.rank,
            ranks=ranks.count,
            workers=config.loader_workers,
            replay=replay.parts if replay else (),
        ),
        " ".join(source.checksum for source in named.values()),
    )
    with locked(folder) if ranks.first else nullcontext():
        # torchrun asks those to end whose peer is lost, and they have yet to say why
        with Interruption():
            try:
                report = pretrain_on(text, config, folder, resume=resume, say=say, ranks=ranks)
            finally:
                # nobody else may have the run before
                finish_writing(ranks, say)
        if not ranks.first:
            return report
        if report:
            # only now: without them and without a report the run would begin anew
            write_report(folder, report)
            if not config.keep_checkpoints:
                remove_checkpoints(folder)
        else:
            say("to go on: the same command with --resume")
    return report


def pretrain_corpus(
    train_corpus: TokenizedCorpus,
    heldout_corpus: TokenizedCorpus,
    tokenizer: Tokenizer,
    config: PretrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Pre-train on tokenised text; as `pretrain`, which calls it.

    Args:
        train_corpus, heldout_corpus: share no document.
        tokenizer: of both.
        config: settings.
        folder: of the run, claimed.
        resume: go on from its newest checkpoint.
        say: told what happens.
    """
    stream_config = config.stream(default_device())
    text = Text(
        tokenizer,
        {"": heldout(heldout_corpus, tokenizer, stream_config.objective, config.max_seq_len)},
        unigram_log_probabilities([train_corpus], tokenizer.vocab_size),
        lambda state: prefetch(
            PretrainingStream(train_corpus, tokenizer, stream_config, state.position)
        ),
    )
    report = pretrain_on(text, config, folder, resume=resume, say=say)
    if report:
        remove_checkpoints(folder)
    return report
