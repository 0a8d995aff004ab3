"""Pre-training from text to a model folder in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.config import EncoderConfig, refuse_foreign_tokenizer
from fastbert.data.cache import shards_of
from fastbert.data.draws import Draws
from fastbert.data.loader import Loader
from fastbert.data.masking import STYLES
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part, hold_out
from fastbert.data.shards import Manifest, open_folder
from fastbert.data.stream import PretrainingStream, StreamConfig, prefetch
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.files import atomic_write, locked
from fastbert.models import BertForMaskedLM, BertForPreTraining, resolve_model
from fastbert.packing import PackedBatch
from fastbert.tokenizer import Tokenizer
from fastbert.training.curves import draw_curves
from fastbert.training.evaluation import (
    evaluate_pretraining,
    heldout,
    heldout_pass,
    unigram_log_probabilities,
    unigram_loss,
)
from fastbert.training.fields import check_fields
from fastbert.training.loop import (
    LoopConfig,
    compute_dtype,
    default_device,
    describe_path,
    refuse_graph,
    train,
)
from fastbert.training.meter import Meter, NoMeter
from fastbert.training.optimizer import OPTIMIZERS, Optimizers
from fastbert.training.parallel import Ranks
from fastbert.training.schedule import Budget
from fastbert.training.state import (
    TrainState,
    check_run,
    claim_run,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)

MODEL_FOLDER, REPORT_FILE = "model", "report.json"
# held-out text past this many tokens makes the scores no better, only later
MOST_HELDOUT_TOKENS = 150_000
HOLD_OUT = 300


@dataclass
class PretrainConfig:
    """Settings of `fastbert pretrain`; every field is a flag of that name."""

    out: str = field(metadata={"help": "folder of the run; must be new, or --resume"})
    size: str = field(default="mini", metadata={"help": "tiny, mini, small, medium, base or large"})
    model: str | None = field(
        default=None,
        metadata={"help": "go on with these weights, of a run or model folder, on this text"},
    )
    replay: str | None = field(
        default=None, metadata={"help": "older text, or shards of it, to mix in and score on"}
    )
    replay_share: float = field(default=0.2, metadata={"help": "of --replay in every window"})
    objective: str = field(
        default="mlm+sop",
        metadata={"help": "mlm, mlm+nsp, mlm+sop, mlm+sop3 (six orders), weighted: mlm+0.5*sop"},
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "end after so many minutes; warm-up and decay follow"}
    )
    max_steps: int | None = field(default=None, metadata={"help": "end after so many steps"})
    token_budget: int = field(default=2048, metadata={"help": "tokens a batch"})
    max_seq_len: int = field(
        default=128, metadata={"help": "tokens a sequence at most; the model's positions"}
    )
    mask_probability: float = field(default=0.15, metadata={"help": "share of tokens to predict"})
    final_mask_probability: float | None = field(
        default=None, metadata={"help": "share at the end of the run, straight from the first"}
    )
    masking: str = field(
        default="token", metadata={"help": "what is predicted as one: " + ", ".join(STYLES)}
    )
    accumulation: int = field(default=1, metadata={"help": "batches an optimiser step"})
    optimizer: str = field(
        default="muon",
        metadata={"help": "muon (with adamw for the rest), adamw, lamb or stable-adamw"},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "peak of AdamW's"})
    muon_learning_rate: float = field(
        default=4e-3, metadata={"help": "peak of Muon's, for the layers' matrices"}
    )
    beta2: float = field(default=0.98, metadata={"help": "decay of the second moment"})
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices and embeddings"})
    clip_norm: float = field(
        default=1.0, metadata={"help": "gradient norm that is scaled down to; 0 for never"}
    )
    schedule: str = field(
        default="linear", metadata={"help": "constant, linear, cosine or wsd, after warm-up"}
    )
    warmup: float = field(default=0.05, metadata={"help": "share of the run spent warming up"})
    dropout: float = field(
        default=0.1, metadata={"help": "0 for runs that see their text about once"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (bf16 where the hardware has it), fp32, bf16 or fp16"},
    )
    cuda_graph: bool = field(
        default=False, metadata={"help": "a step's work on the GPU as one captured graph"}
    )
    loader_workers: int = field(
        default=0, metadata={"help": "processes that prepare batches; 0 for a thread"}
    )
    recompute: bool = field(
        default=False, metadata={"help": "layers twice, for a fraction of the activation memory"}
    )
    heldout: float = field(default=0.02, metadata={"help": "share of documents to score on"})
    evaluate_minutes: float = field(default=5.0, metadata={"help": "between held-out scores"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "between checkpoints"})

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            raise InputError(f"--optimizer must be one of {names}, got {self.optimizer!r}")
        for name in (
            "learning_rate",
            "muon_learning_rate",
            "evaluate_minutes",
            "checkpoint_minutes",
        ):
            if not getattr(self, name) > 0:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} must be more than 0, got {getattr(self, name)}")
        if self.loader_workers < 0:
            raise InputError(f"--loader-workers must be at least 0, got {self.loader_workers}")
        if self.weight_decay < 0.0:
            raise InputError(f"--weight-decay must be at least 0, got {self.weight_decay}")
        if not 0.0 <= self.replay_share < 1.0:
            raise InputError(f"--replay-share must be in [0, 1), got {self.replay_share}")
        if self.clip_norm < 0.0:
            raise InputError(f"--clip-norm must be at least 0, got {self.clip_norm}")
        if not 0.0 <= self.beta2 < 1.0:
            raise InputError(f"--beta2 must be in [0, 1), got {self.beta2}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"--dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 < self.heldout < 1.0:
            raise InputError(f"--heldout must be in (0, 1), got {self.heldout}")

    def loop(self) -> LoopConfig:
        """The part that any task's loop needs."""
        return LoopConfig(
            budget=Budget(self.max_steps, self.max_minutes),
            schedule=self.schedule,
            warmup=self.warmup,
            accumulation=self.accumulation,
            clip_norm=self.clip_norm,
            dropout=self.dropout > 0.0,
            seed=self.seed,
            dtype=self.dtype,
            cuda_graph=self.cuda_graph,
            evaluate_minutes=self.evaluate_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
        )

    def stream(self, device: torch.device) -> StreamConfig:
        """How text becomes batches."""
        return StreamConfig(
            objective=Objective.parse(self.objective),
            token_budget=self.token_budget,
            max_seq_len=self.max_seq_len,
            mask_probability=self.mask_probability,
            final_mask_probability=self.final_mask_probability,
            steps=self.max_steps,
            masking=self.masking,
            replay_share=self.replay_share if self.replay else 0.0,
            seed=self.seed,
            fixed_shapes=device.type != "cpu",
        )

    def encoder(self, vocab_size: int) -> EncoderConfig:
        """The architecture."""
        return EncoderConfig.named(
            self.size,
            vocab_size=vocab_size,
            max_position_embeddings=self.max_seq_len,
            pair_classes=Objective.parse(self.objective).classes,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
        )


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
    if config.cuda_graph:
        refuse_graph(config.optimizer, default_device())
    ranks = Ranks.from_environment(default_device())
    if config.cuda_graph and ranks.count > 1:
        raise InputError("--cuda-graph: for one process; torchrun started several")
    if not ranks.first:
        say = _silent
    try:
        return _pretrain(sources, tokenizer_path, config, settings, ranks, doc_sep, resume, say)
    finally:
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
            step=state.step,
            group=config.accumulation,
            rank=ranks.rank,
            ranks=ranks.count,
            workers=config.loader_workers,
            replay=replay.parts if replay else (),
        ),
        " ".join(source.checksum for source in named.values()),
    )
    with locked(folder) if ranks.first else nullcontext():
        report = _pretrain_on(text, config, folder, resume=resume, say=say, ranks=ranks)
        if not ranks.first:
            return report
        if report:
            # only now: without them and without a report the run would begin anew
            write_report(folder, report)
            remove_checkpoints(folder)
        else:
            say("to go on: the same command with --resume")
    return report


@dataclass(frozen=True)
class Source:
    """One text of a run.

    Attributes:
        parts: to train on.
        heldout: to score on.
        checksum: of text and vocabulary.
    """

    parts: list[Part]
    heldout: TokenizedCorpus
    checksum: str

    @classmethod
    def open(
        cls,
        sources: list[str],
        tokenizer: Tokenizer,
        config: PretrainConfig,
        doc_sep: str,
        say: Callable[[str], None],
    ) -> Source:
        """Map shards, or prepare text into some, and hold a part out."""
        shards = shards_of(sources, tokenizer, doc_sep=doc_sep, say=say)
        manifest, corpora = open_folder(shards, tokenizer.fingerprint, say=say)
        parts, heldout_corpus = _split(config, manifest, corpora)
        say(
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens; "
            f"{heldout_corpus.tokens:,} of them held out"
        )
        return cls(parts, heldout_corpus, manifest.checksum)

    def scored(self, tokenizer: Tokenizer, config: PretrainConfig) -> list[PackedBatch]:
        """The held-out text as batches, the same in every run."""
        objective = Objective.parse(config.objective)
        return heldout_pass(self.heldout, tokenizer, objective, config.max_seq_len)


def _split(
    config: PretrainConfig, manifest: Manifest, corpora: list[TokenizedCorpus]
) -> tuple[list[Part], TokenizedCorpus]:
    """What is trained on, and what is held out."""
    fraction = min(config.heldout, MOST_HELDOUT_TOKENS / manifest.tokens)
    if manifest.documents >= 4 and manifest.documents * fraction >= 1.0:
        # a random next sentence comes from another document
        fraction = max(fraction, 2 / manifest.documents)
    parts, heldout_corpus = hold_out(corpora, fraction, Draws(config.seed, HOLD_OUT))
    fewest = min(heldout_corpus.documents, *(len(part.starts) for part in parts))
    if Objective.parse(config.objective).pair == "nsp" and fewest < 2:
        raise InputError(
            f"--objective {config.objective} needs at least 2 documents to train on in every "
            f"shard and 2 held out, found {manifest.documents} in all; --doc-sep splits the text "
            "otherwise, or take mlm+sop"
        )
    return parts, heldout_corpus


@dataclass(frozen=True)
class Text:
    """What a run trains and is scored on.

    Attributes:
        tokenizer: of all of it.
        scored: held-out batches, by what their figures' names begin with: "" for the text's own.
        log_probabilities: [vocab_size] float64, the unigram's.
        batches: endless, from a state on, each with the position after it; to be closed.
        checksum: of text and vocabulary, where they are on disk.
    """

    tokenizer: Tokenizer
    scored: dict[str, list[PackedBatch]]
    log_probabilities: np.ndarray
    batches: Callable[[TrainState], Any]
    checksum: str = ""


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
    report = _pretrain_on(text, config, folder, resume=resume, say=say)
    if report:
        remove_checkpoints(folder)
    return report


def _pretrain_on(
    text: Text,
    config: PretrainConfig,
    folder: Path,
    *,
    resume: bool,
    say: Callable[[str], None],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    ranks = ranks or Ranks()
    device = default_device()
    loop, stream_config = config.loop(), config.stream(device)
    dtype = compute_dtype(config.dtype, device)
    tokenizer = text.tokenizer
    model = _model(config, text)
    objective = stream_config.objective
    model.loss_weights = (objective.mlm_weight, objective.pair_weight)
    model.encoder.recompute = config.recompute
    model.to(device)
    optimizers = _optimizers(model, config)
    state = TrainState(corpus=text.checksum)
    if resume:
        # one after another: a damaged checkpoint is set aside but once
        if not ranks.first:
            ranks.barrier()
        state = load_checkpoint(folder, model, optimizers, say=say)
        if ranks.first:
            ranks.barrier()
        if state.corpus and state.corpus != text.checksum:
            raise InputError(
                f"--resume: the text or the vocabulary has changed since {folder} was started"
            )
        state.corpus = text.checksum
    meter = Meter(folder, "pretrain") if ranks.first else NoMeter()
    say(describe_path(device))
    say(
        f"pre-training {config.size} ({sum(p.numel() for p in model.parameters()):,} parameters) "
        f"on {device.type} in {str(dtype).removeprefix('torch.')}, {stream_config.objective}, "
        f"{config.token_budget * config.accumulation:,} tokens a step"
    )

    def evaluate() -> dict[str, float]:
        return {
            f"{name}{figure}": value
            for name, batches in text.scored.items()
            for figure, value in evaluate_pretraining(model, batches, dtype).items()
        }

    if config.model is not None and not state.step and ranks.first:
        # what the weights know before they see this text
        meter.evaluation(state, evaluate())
    before = state.tokens, state.seconds
    with closing(text.batches(state)) as batches:
        finished = train(
            model,
            optimizers,
            batches,
            loop,
            state,
            meter,
            folder,
            evaluate=evaluate,
            ranks=ranks,
        )
    meter.close()
    if not finished:
        say(f"interrupted at step {state.step}; saved")
        return {}
    if not ranks.first:
        return {}
    save_checkpoint(folder, state, model, optimizers)
    figures = evaluate()
    meter.evaluation(state, figures)
    unigram = unigram_loss(text.scored[""], text.log_probabilities)
    model.save_pretrained(folder / MODEL_FOLDER)
    tokenizer.save_pretrained(folder / MODEL_FOLDER, model_max_length=config.max_seq_len)
    stream_config.objective.save(folder / MODEL_FOLDER, config.max_seq_len)
    report = {
        **{f"{name}_heldout": value for name, value in figures.items()},
        "unigram_loss_heldout": unigram,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "real_tokens_per_s": round(
            (state.tokens - before[0]) / max(state.seconds - before[1], 1e-9), 1
        ),
        "packing_efficiency": round(
            state.tokens / (state.step * config.token_budget * config.accumulation), 4
        ),
    }
    title = f"fastbert {config.size}, {stream_config.objective}: {state.tokens:,} tokens"
    picture = draw_curves(folder, title, baseline=unigram)
    say(_summary(report, config.objective, folder, picture))
    return report


def _model(config: PretrainConfig, text: Text) -> BertForPreTraining | BertForMaskedLM:
    """Fresh weights, or those of `--model`."""
    objective = Objective.parse(config.objective)
    architecture = BertForPreTraining if objective.pair else BertForMaskedLM
    vocab_size = text.tokenizer.vocab_size
    if config.model is None:
        model = architecture.from_config(config.encoder(vocab_size), config.seed)
        # a decoder that starts at the unigram need not spend its first steps on finding it
        model.masked_lm.bias.data.copy_(torch.from_numpy(text.log_probabilities))
        return model
    folder = resolve_model(config.model)
    saved = EncoderConfig.from_pretrained(folder)
    refuse_foreign_tokenizer(vocab_size, saved, f"--model {config.model}")
    if config.max_seq_len > saved.max_position_embeddings:
        raise InputError(
            f"--max-seq-len must be at most {saved.max_position_embeddings}, the positions of "
            f"--model {config.model}, got {config.max_seq_len}"
        )
    if objective.pair and saved.pair_classes != objective.classes:
        raise InputError(
            f"--objective {config.objective}: --model {config.model} tells {saved.pair_classes} "
            f"orders apart, not {objective.classes}"
        )
    changed = dataclasses.replace(
        saved,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )
    return architecture.from_pretrained(folder, config=changed, new_heads=True, seed=config.seed)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    with atomic_write(folder / REPORT_FILE) as file:
        json.dump(report, file, indent=2)
        file.write("\n")


def _optimizers(model: nn.Module, config: PretrainConfig) -> Optimizers:
    return Optimizers(
        model,
        config.optimizer,
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
    )


def _summary(report: dict[str, Any], objective: str, folder: Path, picture: Path | None) -> str:
    lines = [
        f"held out: masked-LM loss {report['mlm_loss_heldout']:.3f} nats "
        f"(unigram {report['unigram_loss_heldout']:.3f}), "
        f"masked accuracy {report['masked_accuracy_heldout']:.1%}"
    ]
    if "pair_accuracy_heldout" in report:
        chance = 1.0 / Objective.parse(objective).classes
        lines[0] += f", pair accuracy {report['pair_accuracy_heldout']:.1%} (chance {chance:.0%})"
    if "replay_mlm_loss_heldout" in report:
        lines.append(
            f"held out of --replay: masked-LM loss {report['replay_mlm_loss_heldout']:.3f} nats, "
            f"masked accuracy {report['replay_masked_accuracy_heldout']:.1%}"
        )
    lines.append(f"model in {folder / MODEL_FOLDER}")
    if picture is None:
        lines.append("no curves.png: matplotlib is not installed (pip install 'fastbert[plot]')")
    return "\n".join(lines)
