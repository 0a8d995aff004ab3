"""Published pre-training settings by name, each with its source.

They set how a model is trained, not what it is: sizes and architecture stay what `--size` says.
Warm-up is a share of the run, so that `--budget` rescales it and the decay with it. Batches are
`token_budget * accumulation` tokens a step; a batch given in sequences counts its full length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastbert.errors import InputError


@dataclass(frozen=True)
class Preset:
    """Fields of PretrainConfig, where they are from, and what they leave out."""

    source: str
    fields: dict[str, Any]
    differs: str = ""
    steps: int | None = field(default=None)


PRESETS = {
    "bert-original": Preset(
        "Devlin et al. 2018, arXiv:1810.04805, appendix A.2: 256 sequences, of 128 for 90 % of 1M "
        "steps and of 512 for the rest; "
        "clipping at 1 as in google-research/bert, optimization.py",
        {
            "size": "base",
            "objective": "mlm+nsp",
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "beta2": 0.999,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup": 0.01,
            "dropout": 0.1,
            "mask_probability": 0.15,
            "max_seq_len": 512,
            "token_budget": 16384,
            "accumulation": 8,
            "first_seq_len": 128,
            "first_accumulation": 2,
            "first_share": 0.9,
        },
        "",
        1_000_000,
    ),
    "roberta": Preset(
        "Liu et al. 2019, arXiv:1907.11692, table 9 (base): 8K sequences of 512, 500K steps",
        {
            "size": "base",
            "objective": "mlm",
            "optimizer": "adamw",
            "learning_rate": 6e-4,
            "beta2": 0.98,
            "weight_decay": 0.01,
            "clip_norm": 0.0,
            "schedule": "linear",
            "warmup": 0.048,
            "dropout": 0.1,
            "mask_probability": 0.15,
            "max_seq_len": 512,
            "token_budget": 16384,
            "accumulation": 256,
        },
        "",
        500_000,
    ),
    "bert-large-lamb": Preset(
        "You et al. 2020, arXiv:1904.00962, with the phase-1 settings of NVIDIA's "
        "DeepLearningExamples (BERT, scripts/configs/pretrain_config.sh): 8 times 8,192 sequences "
        "of 128, 7,038 steps",
        {
            "size": "large",
            "objective": "mlm+nsp",
            "optimizer": "lamb",
            "learning_rate": 6e-3,
            "beta2": 0.999,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "schedule": "linear",
            "warmup": 0.2843,
            "dropout": 0.1,
            "mask_probability": 0.15,
            "max_seq_len": 128,
            "token_budget": 32768,
            "accumulation": 256,
        },
        "phase 2, 1,563 steps at length 512 and a peak of 4e-3, is a run of its own; the decay "
        "there is the square root of a straight line, here straight",
        7_038,
    ),
    "24h-bert": Preset(
        "Izsak et al. 2021, arXiv:2104.07705, as the authors run their best configuration "
        "(academic-budget-bert, README): 4,096 sequences of 128, a day on 8 GPUs",
        {
            "size": "large",
            "objective": "mlm",
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "beta2": 0.98,
            "weight_decay": 0.01,
            "clip_norm": 0.0,
            "schedule": "linear",
            "warmup": 0.06,
            "dropout": 0.1,
            "mask_probability": 0.15,
            "max_seq_len": 128,
            "token_budget": 32768,
            "accumulation": 16,
        },
        "the published model normalises before, not after, each block",
    ),
    "cramming": Preset(
        "Geiping and Goldstein 2022, arXiv:2212.14034, section 4.3, in the authors' last version "
        "(cramming, config/train/bert-o4): batch ramped to 8,192 sequences of 128, 25 % masked, no "
        "dropout, clipping at 0.5, the rate up for three quarters of the run and down in the last",
        {
            "size": "base",
            "objective": "mlm",
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "beta2": 0.98,
            "weight_decay": 0.01,
            "clip_norm": 0.5,
            "schedule": "linear",
            "warmup": 0.75,
            "dropout": 0.0,
            "mask_probability": 0.25,
            "max_seq_len": 128,
            "token_budget": 16384,
            "accumulation": 64,
            "first_accumulation": 1,
            # 60 % of the tokens
            "ramp_share": 0.75,
        },
        "the published rate starts at a quarter of its peak, here at 0; under a budget of time the "
        "batch is not ramped here",
    ),
    "mosaicbert": Preset(
        "Portes et al. 2023, arXiv:2312.17482, as in mosaicml/examples (benchmarks/bert, "
        "mosaic-bert-base-uncased.yaml): 4,096 sequences of 128, 286.72M of them, 30 % masked, "
        "decoupled weight decay 1e-5",
        {
            "size": "base",
            "objective": "mlm",
            "optimizer": "adamw",
            "learning_rate": 5e-4,
            "beta2": 0.98,
            "weight_decay": 1e-5,
            "clip_norm": 0.0,
            "schedule": "linear",
            "warmup": 0.06,
            "dropout": 0.1,
            "mask_probability": 0.3,
            "max_seq_len": 128,
            "token_budget": 32768,
            "accumulation": 16,
        },
        "the published rate ends at 2 % of its peak, here at 0; no dropout of attention there",
        70_000,
    ),
    "modernbert": Preset(
        "Warner et al. 2024, arXiv:2412.13663, table 3 (base), and the authors' "
        "modernbert-base-pretrain.yaml: 4,608 sequences of 1,024, at the start 96 a GPU and more "
        "over 50B tokens, of 1,719B; 3B of warm-up, StableAdamW, 30 % masked",
        {
            "size": "base",
            "objective": "mlm",
            "optimizer": "stable-adamw",
            "learning_rate": 8e-4,
            "beta2": 0.98,
            "weight_decay": 1e-5,
            "clip_norm": 0.0,
            "schedule": "wsd",
            "warmup": 0.002,
            "dropout": 0.0,
            "mask_probability": 0.3,
            "max_seq_len": 1024,
            "token_budget": 32768,
            "accumulation": 144,
            "first_accumulation": 24,
            # 50B tokens
            "ramp_share": 0.049,
        },
        "length stays 1,024; the plateau there lasts to the end "
        "of 1,719B tokens, and 50B of decay follow those of longer context; here the last 40 % "
        "decay; attention's output is dropped out at 0.1 there",
    ),
    "neobert-like": Preset(
        "Le Breton et al. 2025, arXiv:2502.19587, section 3: batches of 2M tokens, 1M steps, 2,000 "
        "of warm-up, AdamW with betas 0.9 and 0.95, 20 % masked, cosine decay over 900K steps",
        {
            "size": "base",
            "objective": "mlm",
            "optimizer": "adamw",
            "learning_rate": 6e-4,
            "beta2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "schedule": "cosine",
            "warmup": 0.002,
            "dropout": 0.0,
            "mask_probability": 0.2,
            "max_seq_len": 1024,
            "token_budget": 32768,
            "accumulation": 64,
        },
        "every chosen token is masked there; here 80/10/10; the rate ends at 0, not at a tenth",
    ),
}


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: an unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
