"""Settings of a pre-training run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from fastbert.config import EncoderConfig
from fastbert.data.curriculum import Curriculum
from fastbert.data.masking import STYLES
from fastbert.data.objectives import Objective
from fastbert.data.stream import StreamConfig
from fastbert.errors import InputError
from fastbert.training.fields import check_fields
from fastbert.training.loop import LoopConfig
from fastbert.training.optimizer import OPTIMIZERS
from fastbert.training.parallel import PARALLEL
from fastbert.training.schedule import Budget


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
        metadata={
            "help": "mlm, mlm+nsp, mlm+sop, mlm+sop3 (six orders), weighted: mlm+0.5*sop; or rtd "
            "(ELECTRA: a generator's replacements are to be found)"
        },
    )
    generator_share: float = field(
        default=0.25, metadata={"help": "of rtd: hidden size of the generator over --size's"}
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
    first_seq_len: int | None = field(
        default=None, metadata={"help": "--max-seq-len for the first steps, --first-share of all"}
    )
    first_share: float = field(
        default=0.9, metadata={"help": "of the steps at --first-seq-len and --first-accumulation"}
    )
    first_accumulation: int | None = field(
        default=None, metadata={"help": "--accumulation for the first steps"}
    )
    ramp_share: float = field(
        default=0.0,
        metadata={
            "help": "of the steps in which batches grow straight from --first-accumulation; "
            "0 for a jump after --first-share"
        },
    )
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
    layer_decay: float = field(
        default=1.0, metadata={"help": "learning rate of a layer over that of the one above"}
    )
    ema: float = field(
        default=0.0,
        metadata={
            "help": "decay of a running mean of the weights, such as 0.999, which is scored and "
            "saved in their place; 0 for none"
        },
    )
    spike_sigma: float = field(
        default=10.0,
        metadata={
            "help": "a loss or gradient norm so many standard deviations above the mean takes the "
            "run back to before it; 0 for never"
        },
    )
    spike_steps: int = field(
        default=100, metadata={"help": "between the copies of weights that a spike goes back to"}
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
    parallel: str = field(
        default="ddp",
        metadata={"help": "under torchrun each process holds the model (ddp) or a part (fsdp)"},
    )
    loader_workers: int = field(
        default=0, metadata={"help": "processes that prepare batches; 0 for a thread"}
    )
    recompute: bool = field(
        default=False, metadata={"help": "layers twice, for a fraction of the activation memory"}
    )
    heldout: float = field(default=0.02, metadata={"help": "share of documents to score on"})
    log_to: str = field(
        default="", metadata={"help": "besides metrics.jsonl: tensorboard, wandb, or both by comma"}
    )
    evaluate_minutes: float = field(default=5.0, metadata={"help": "between held-out scores"})
    checkpoint_minutes: float = field(default=5.0, metadata={"help": "between checkpoints"})
    keep_checkpoints: int = field(
        default=0,
        metadata={
            "help": "newest checkpoints to keep, in a finished run too, for `fastbert average`; "
            "0 for two while it runs"
        },
    )
    keep_best: bool = field(
        default=False, metadata={"help": "also keep the model of the best held-out loss, in best/"}
    )

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
        if self.parallel not in PARALLEL:
            names = " or ".join(PARALLEL)
            raise InputError(f"--parallel must be {names}, got {self.parallel!r}")
        for flag, wanted in (
            ("--cuda-graph", self.cuda_graph),
            ("--ema", self.ema),
            ("--objective rtd", self.objective.endswith("rtd")),
        ):
            if wanted and self.parallel == "fsdp":
                raise InputError(f"{flag}: not with --parallel fsdp; take --parallel ddp")
        if self.loader_workers < 0:
            raise InputError(f"--loader-workers must be at least 0, got {self.loader_workers}")
        if self.weight_decay < 0.0:
            raise InputError(f"--weight-decay must be at least 0, got {self.weight_decay}")
        if not 0.0 <= self.replay_share < 1.0:
            raise InputError(f"--replay-share must be in [0, 1), got {self.replay_share}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise InputError(f"--layer-decay must be in (0, 1], got {self.layer_decay}")
        if self.keep_checkpoints < 0:
            raise InputError(f"--keep-checkpoints must be at least 0, got {self.keep_checkpoints}")
        if not 0.0 <= self.ema < 1.0:
            raise InputError(f"--ema must be in [0, 1), got {self.ema}")
        if self.spike_sigma < 0.0:
            raise InputError(f"--spike-sigma must be at least 0, got {self.spike_sigma}")
        if self.spike_steps < 1:
            raise InputError(f"--spike-steps must be at least 1, got {self.spike_steps}")
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
            curriculum=self.curriculum(),
            clip_norm=self.clip_norm,
            # the generator's draws are named like those of dropout
            dropout=self.dropout > 0.0 or Objective.parse(self.objective).detection,
            seed=self.seed,
            dtype=self.dtype,
            cuda_graph=self.cuda_graph,
            evaluate_minutes=self.evaluate_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_checkpoints=self.keep_checkpoints,
        )

    def curriculum(self) -> Curriculum:
        """How sequence length and batch grow."""
        return Curriculum(
            max_seq_len=self.max_seq_len,
            accumulation=self.accumulation,
            steps=self.max_steps,
            first_seq_len=self.first_seq_len,
            first_accumulation=self.first_accumulation,
            first_share=self.first_share,
            ramp_share=self.ramp_share,
        )

    @property
    def tokens_a_step(self) -> int:
        """Token slots an optimiser step, in the mean of the run."""
        # growth is told in shares of the run, whatever its steps
        curriculum = dataclasses.replace(self, max_steps=1).curriculum()
        return round(self.token_budget * curriculum.mean_accumulation)

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
