"""Settings that every task of `fastbert finetune` shares; a task's own are fields of its class."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastbert.errors import InputError
from fastbert.tasks.sequences import SHORTEST
from fastbert.training.fields import check_fields
from fastbert.training.loop import compute_dtype, default_device, refuse_graph
from fastbert.training.methods import CLASS_WEIGHTS, parse_freeze
from fastbert.training.optimizer import OPTIMIZERS

# the published recipe's (Devlin et al. 2018); small files need more passes to get anywhere
# (Mosbach et al. 2020, arXiv:2006.04884)
EPOCHS, FEWEST_STEPS, MOST_EPOCHS = 3, 200, 20
# hidden size from which on a peak serves: narrow models want larger steps (Turc et al. 2019)
LEARNING_RATES = ((1024, 3e-5), (768, 5e-5), (384, 1e-4), (0, 3e-4))


@dataclass
class FinetuneConfig:
    """How a model is fine-tuned, whatever the task; every field is a flag of that name.

    Raises:
        InputError: a value out of range; the message names the flag.
    """

    model: str = field(
        metadata={"help": "pre-trained model: a run of pretrain, a model folder, or a hub's name"}
    )
    train: str = field(metadata={"help": "labelled examples to train on"})
    eval: str = field(metadata={"help": "labelled examples to score on, in the same format"})
    out: str = field(metadata={"help": "folder of the run; must be new, or --resume"})
    epochs: float | None = field(
        default=None,
        metadata={"help": "passes over --train; default 3, for small files up to 20 (200 steps)"},
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "optimiser steps, in place of --epochs"}
    )
    batch_size: int = field(default=32, metadata={"help": "examples an optimiser step"})
    accumulation: int = field(
        default=1, metadata={"help": "parts a step is computed in, to save memory"}
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw or muon"})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak; default by width: 3e-5 large, 5e-5 base, 1e-4 small, 3e-4 mini"},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices and embeddings"})
    warmup: float = field(default=0.1, metadata={"help": "share of the run spent warming up"})
    dropout: float = field(
        default=0.1, metadata={"help": "in training, whatever pre-training had; 0 for none"}
    )
    max_seq_len: int | None = field(
        default=None,
        metadata={"help": "tokens a sequence at most; default the model's positions"},
    )
    freeze: str = field(
        default="none",
        metadata={"help": "not trained: none, embeddings, a number of first layers, or encoder"},
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "learning rate of a layer over that of the one above it"}
    )
    patience: int = field(
        default=0,
        metadata={"help": "evaluations without a better one before stopping; 0 for never"},
    )
    class_weights: str = field(
        default="none", metadata={"help": "balanced: rare classes count more; or none"}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the target spread over all classes"}
    )
    adversarial: float = field(
        default=0.0, metadata={"help": "length of a step against the word embeddings (FGM); 0 none"}
    )
    seed: int = field(default=0, metadata={"help": "of order, dropout and new weights"})
    seeds: int = field(
        default=1,
        metadata={"help": "runs, with seeds one after another; mean and ensemble are told"},
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (bf16 where the hardware has it), fp32, bf16 or fp16"},
    )
    cuda_graph: bool = field(
        default=False, metadata={"help": "a step's work on the GPU as one captured graph"}
    )
    evaluate_epochs: int = field(
        default=1, metadata={"help": "epochs between evaluations; 0 for one at the end alone"}
    )
    keep_best: bool = field(
        default=True, metadata={"help": "keep the model of the best evaluation, not the last"}
    )
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "between checkpoints"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --out"})

    def __post_init__(self) -> None:
        check_fields(self)
        for name, lowest, exclusive in (
            ("epochs", 0, True),
            ("max_steps", 1, False),
            ("batch_size", 1, False),
            ("accumulation", 1, False),
            ("learning_rate", 0, True),
            ("weight_decay", 0, False),
            ("max_seq_len", SHORTEST, False),
            ("evaluate_epochs", 0, False),
            ("patience", 0, False),
            ("adversarial", 0, False),
            ("seeds", 1, False),
        ):
            value = getattr(self, name)
            if value is not None and not (value > lowest if exclusive else value >= lowest):
                flag, bound = name.replace("_", "-"), "more than" if exclusive else "at least"
                raise InputError(f"--{flag} must be {bound} {lowest}, got {value}")
        for name in ("warmup", "dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise InputError(f"--layer-decay must be in (0, 1], got {self.layer_decay}")
        for name, known in (("optimizer", OPTIMIZERS), ("class_weights", CLASS_WEIGHTS)):
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise InputError(
                    f"--{flag} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        parse_freeze(self.freeze)
        if self.adversarial and self.freeze != "none":
            raise InputError("--adversarial moves the word embeddings, which --freeze keeps still")
        if self.patience and not self.evaluate_epochs:
            raise InputError("--patience needs evaluations between: --evaluate-epochs is 0")
        compute_dtype(self.dtype, torch.device("cpu"))
        if self.cuda_graph:
            refuse_graph(default_device())
            if self.adversarial:
                raise InputError(
                    "--adversarial: a step of two passes is not captured (--cuda-graph)"
                )

    def steps(self, steps_an_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is not None:
            return max(round(self.epochs * steps_an_epoch), 1)
        wanted = max(FEWEST_STEPS, EPOCHS * steps_an_epoch)
        return min(wanted, MOST_EPOCHS * steps_an_epoch)

    def peak(self, hidden_size: int) -> float:
        """The peak learning rate for a model of this width."""
        if self.learning_rate is not None:
            return self.learning_rate
        return next(rate for width, rate in LEARNING_RATES if hidden_size >= width)
