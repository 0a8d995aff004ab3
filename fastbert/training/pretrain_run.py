"""A pre-training run from its text to a model folder and a report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from fastbert.data.objectives import Objective
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.models import BertForMaskedLM, BertForPreTraining
from fastbert.training.curves import draw_curves
from fastbert.training.detection import GENERATOR_FOLDER, ReplacedTokenPretraining
from fastbert.training.evaluation import evaluate_pretraining, unigram_loss
from fastbert.training.fsdp import in_one_piece, shard_model
from fastbert.training.loop import compute_dtype, default_device, describe_path, train
from fastbert.training.meter import Meter, NoMeter
from fastbert.training.operations import peak_operations
from fastbert.training.parallel import Ranks
from fastbert.training.pretrain_config import PretrainConfig
from fastbert.training.pretrain_model import PretrainingModel, build_model, build_optimizers
from fastbert.training.pretrain_text import Text
from fastbert.training.sharded_state import load_run, save_run
from fastbert.training.spikes import SpikeGuard
from fastbert.training.state import TrainState
from fastbert.training.trackers import open_trackers

MODEL_FOLDER, BEST_FOLDER, REPORT_FILE = "model", "best", "report.json"


def pretrain_on(
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
    model = build_model(config, text)
    model.to(device)
    if ranks.sharded:
        shard_model(_one_encoder(model), ranks, dtype)
    optimizers = build_optimizers(model, config)
    guard = None
    if config.spike_sigma:
        guard = SpikeGuard(model, optimizers, config.spike_sigma, config.spike_steps)
    state = TrainState(corpus=text.checksum)
    if resume:
        state = load_run(folder, model, optimizers, ranks, say=say, keeper=guard)
        if state.corpus and state.corpus != text.checksum:
            raise InputError(
                f"--resume: the text or the vocabulary has changed since {folder} was started"
            )
        state.corpus = text.checksum
    meter = _meter(config, folder, state, peak_operations(device, dtype), ranks)
    say(describe_path(device))
    say(
        f"pre-training {config.size} ({sum(p.numel() for p in model.parameters()):,} parameters) "
        f"on {device.type} in {str(dtype).removeprefix('torch.')}, {stream_config.objective}, "
        f"{config.token_budget * config.accumulation:,} tokens a step"
    )

    def scores() -> dict[str, float]:
        return {
            f"{name}{figure}": value
            for name, batches in text.scored.items()
            for figure, value in evaluate_pretraining(model, batches, dtype).items()
        }

    def save(name: str) -> None:
        # of a model in shards every rank has a part to give
        whole = in_one_piece(_one_encoder(model)) if ranks.sharded else model
        if not ranks.first:
            return
        whole.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name, model_max_length=config.max_seq_len)
        stream_config.objective.save(folder / name, config.max_seq_len)
        if stream_config.objective.detection:
            own = folder / name / GENERATOR_FOLDER
            tokenizer.save_pretrained(own, model_max_length=config.max_seq_len)
            Objective().save(own, config.max_seq_len)

    def evaluate() -> dict[str, float]:
        # what is scored is what is saved
        with optimizers.average.applied() if optimizers.average else nullcontext():
            figures = scores()
            best = state.best.get("mlm_loss", math.inf)
            if config.keep_best and figures["mlm_loss"] < best:
                save(BEST_FOLDER)
                state.best = {"mlm_loss": figures["mlm_loss"], "step": state.step}
        return figures

    if config.model is not None and not state.step and ranks.scores:
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
            guard=guard,
        )
    meter.close()
    if not finished:
        say(f"interrupted at step {state.step}; saved")
        return {}
    kept = config.keep_checkpoints
    save_run(folder, state, model, optimizers, ranks, keeper=guard, kept=kept)
    if ranks.sharded:
        model = in_one_piece(_one_encoder(model))
    if not ranks.first:
        return {}
    figures = evaluate()
    meter.evaluation(state, figures)
    unigram = unigram_loss(text.scored[""], text.log_probabilities)
    own = scores()["mlm_loss"] if optimizers.average else None
    with optimizers.average.applied() if optimizers.average else nullcontext():
        save(MODEL_FOLDER)
    report = {
        **{f"{name}_heldout": value for name, value in figures.items()},
        **({} if own is None else {"mlm_loss_heldout_without_ema": own}),
        **{f"best_{name}": value for name, value in state.best.items()},
        "unigram_loss_heldout": unigram,
        "steps": state.step,
        "tokens": state.tokens,
        "rollbacks": len(state.rollbacks),
        "seconds": round(state.seconds, 1),
        "real_tokens_per_s": round(
            (state.tokens - before[0]) / max(state.seconds - before[1], 1e-9), 1
        ),
        "packing_efficiency": round(state.tokens / state.slots, 4),
    }
    title = f"fastbert {config.size}, {stream_config.objective}: {state.tokens:,} tokens"
    picture = draw_curves(folder, title, baseline=unigram)
    say(_summary(report, config.objective, folder, picture))
    return report


def _one_encoder(model: PretrainingModel) -> BertForPreTraining | BertForMaskedLM:
    # the settings refuse the other kind
    assert not isinstance(model, ReplacedTokenPretraining)
    return model


def _meter(
    config: PretrainConfig, folder: Path, state: TrainState, peak: float | None, ranks: Ranks
) -> Meter:
    if not ranks.first:
        return NoMeter()
    trackers = open_trackers(config.log_to, folder, dataclasses.asdict(config), state.step)
    return Meter(folder, "pretrain", trackers=trackers, peak=peak * ranks.count if peak else None)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    with atomic_write(folder / REPORT_FILE) as file:
        json.dump(report, file, indent=2)
        file.write("\n")


def _summary(report: dict[str, Any], objective: str, folder: Path, picture: Path | None) -> str:
    lines = [
        f"held out: masked-LM loss {report['mlm_loss_heldout']:.3f} nats "
        f"(unigram {report['unigram_loss_heldout']:.3f}), "
        f"masked accuracy {report['masked_accuracy_heldout']:.1%}"
    ]
    if "replaced_accuracy_heldout" in report:
        lines[0] += f" (the generator's), replaced-token loss {report['replaced_loss_heldout']:.3f}"
    if "pair_accuracy_heldout" in report:
        chance = 1.0 / Objective.parse(objective).classes
        lines[0] += f", pair accuracy {report['pair_accuracy_heldout']:.1%} (chance {chance:.0%})"
    if "replay_mlm_loss_heldout" in report:
        lines.append(
            f"held out of --replay: masked-LM loss {report['replay_mlm_loss_heldout']:.3f} nats, "
            f"masked accuracy {report['replay_masked_accuracy_heldout']:.1%}"
        )
    if "mlm_loss_heldout_without_ema" in report:
        lines.append(
            f"without --ema: masked-LM loss {report['mlm_loss_heldout_without_ema']:.3f} nats"
        )
    lines.append(f"model in {folder / MODEL_FOLDER}")
    if "best_step" in report:
        lines.append(
            f"best held-out loss {report['best_mlm_loss']:.3f} nats, at step "
            f"{report['best_step']}: model in {folder / BEST_FOLDER}"
        )
    if picture is None:
        lines.append("no curves.png: matplotlib is not installed (pip install 'fastbert[plot]')")
    return "\n".join(lines)
