"""A pre-training run from its text to a model folder and a report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
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
    """Train on a text, in a folder that is claimed, and leave a model there.

    Returns:
        The report; empty where the run was interrupted, and on all ranks but the first.
    """
    run = Run(text, config, folder, ranks or Ranks(), say)
    if resume:
        run.load()
    run.describe()
    if not run.train():
        say(f"interrupted at step {run.state.step}; saved")
        return {}
    return run.finish()


class Run:
    """One run's parts.

    Args:
        text: what it trains and is scored on.
        config: settings.
        folder: of the run.
        ranks: that train together.
        say: told what happens.

    Attributes:
        state: how far it has come.
    """

    def __init__(
        self,
        text: Text,
        config: PretrainConfig,
        folder: Path,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.text, self.config, self.folder, self.ranks, self.say = text, config, folder, ranks, say
        self.device = default_device()
        self.objective = Objective.parse(config.objective)
        self.dtype = compute_dtype(config.dtype, self.device)
        self.model = build_model(config, text)
        self.model.to(self.device)
        if ranks.sharded:
            shard_model(_one_encoder(self.model), ranks, self.dtype)
        self.optimizers = build_optimizers(self.model, config)
        self.guard: SpikeGuard | None = None
        if config.spike_sigma:
            self.guard = SpikeGuard(
                self.model, self.optimizers, config.spike_sigma, config.spike_steps
            )
        self.state = TrainState(corpus=text.checksum)

    def load(self) -> None:
        """Go on from the newest checkpoint.

        Raises:
            InputError: it is of another text, or none is intact.
        """
        self.state = load_run(
            self.folder, self.model, self.optimizers, self.ranks, say=self.say, keeper=self.guard
        )
        checksum = self.text.checksum
        if self.state.corpus and self.state.corpus != checksum:
            raise InputError(
                f"--resume: the text or the vocabulary has changed since {self.folder} was started"
            )
        self.state.corpus = checksum

    def describe(self) -> None:
        """Say what is about to be done."""
        config = self.config
        self.say(describe_path(self.device))
        self.say(
            f"pre-training {config.size} "
            f"({sum(p.numel() for p in self.model.parameters()):,} parameters) on "
            f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}, {self.objective}, "
            f"{config.token_budget * config.accumulation:,} tokens a step"
        )

    def train(self) -> bool:
        """To the end; False where somebody interrupted."""
        self.meter = self._meter()
        self._before = self.state.tokens, self.state.seconds
        if self.config.model is not None and not self.state.step and self.ranks.scores:
            # what the weights know before they see this text
            self.meter.evaluation(self.state, self.evaluate())
        with closing(self.text.batches(self.state)) as batches:
            finished = train(
                self.model,
                self.optimizers,
                batches,
                self.config.loop(),
                self.state,
                self.meter,
                self.folder,
                evaluate=self.evaluate,
                ranks=self.ranks,
                guard=self.guard,
            )
        if not finished:
            self.meter.close()
        return finished

    def finish(self) -> dict[str, Any]:
        """Save and score what has been trained; the report, on the first rank."""
        save_run(
            self.folder,
            self.state,
            self.model,
            self.optimizers,
            self.ranks,
            keeper=self.guard,
            kept=self.config.keep_checkpoints,
        )
        if self.ranks.sharded:
            self.model = in_one_piece(_one_encoder(self.model))
        if not self.ranks.first:
            return {}
        figures = self.evaluate()
        self.meter.evaluation(self.state, figures)
        self.meter.close()
        own = self._scores()["mlm_loss"] if self.optimizers.average else None
        with self._averaged():
            self._save(MODEL_FOLDER)
        report = self._report(figures, own)
        title = f"fastbert {self.config.size}, {self.objective}: {self.state.tokens:,} tokens"
        picture = draw_curves(self.folder, title, baseline=report["unigram_loss_heldout"])
        self.say(_summary(report, self.config.objective, self.folder, picture))
        return report

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of what would be saved; the best is."""
        with self._averaged():
            figures = self._scores()
            best = self.state.best.get("mlm_loss", math.inf)
            if self.config.keep_best and figures["mlm_loss"] < best:
                self._save(BEST_FOLDER)
                self.state.best = {"mlm_loss": figures["mlm_loss"], "step": self.state.step}
        return figures

    def _averaged(self) -> AbstractContextManager[None]:
        average = self.optimizers.average
        return average.applied() if average else nullcontext()

    def _scores(self) -> dict[str, float]:
        return {
            f"{name}{figure}": value
            for name, batches in self.text.scored.items()
            for figure, value in evaluate_pretraining(self.model, batches, self.dtype).items()
        }

    def _save(self, name: str) -> None:
        # of a model in shards every rank has a part to give
        sharded = self.ranks.sharded
        model = in_one_piece(_one_encoder(self.model)) if sharded else self.model
        if not self.ranks.first:
            return
        folder, length = self.folder / name, self.config.max_seq_len
        model.save_pretrained(folder)
        self.text.tokenizer.save_pretrained(folder, model_max_length=length)
        self.objective.save(folder, length)
        if self.objective.detection:
            own = folder / GENERATOR_FOLDER
            self.text.tokenizer.save_pretrained(own, model_max_length=length)
            Objective().save(own, length)

    def _report(self, figures: dict[str, float], without_ema: float | None) -> dict[str, Any]:
        state, (tokens, seconds) = self.state, self._before
        text = self.text
        extra = {} if without_ema is None else {"mlm_loss_heldout_without_ema": without_ema}
        speed = (state.tokens - tokens) / max(state.seconds - seconds, 1e-9)
        return {
            **{f"{name}_heldout": value for name, value in figures.items()},
            **extra,
            **{f"best_{name}": value for name, value in state.best.items()},
            "unigram_loss_heldout": unigram_loss(text.scored[""], text.log_probabilities),
            "steps": state.step,
            "tokens": state.tokens,
            "rollbacks": len(state.rollbacks),
            "seconds": round(state.seconds, 1),
            "real_tokens_per_s": round(speed, 1),
            "packing_efficiency": round(state.tokens / state.slots, 4),
        }

    def _meter(self) -> Meter:
        if not self.ranks.first:
            return NoMeter()
        settings = dataclasses.asdict(self.config)
        trackers = open_trackers(self.config.log_to, self.folder, settings, self.state.step)
        peak = peak_operations(self.device, self.dtype)
        of_all = peak * self.ranks.count if peak else None
        return Meter(self.folder, "pretrain", trackers=trackers, peak=of_all)


def _one_encoder(model: PretrainingModel) -> BertForPreTraining | BertForMaskedLM:
    # the settings refuse the other kind
    assert not isinstance(model, ReplacedTokenPretraining)
    return model


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
