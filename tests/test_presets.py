from __future__ import annotations

import argparse
import re

import pytest
import torch

from fastbert.cli import _parser
from fastbert.commands.pretrain import pretrain_config
from fastbert.errors import InputError
from fastbert.training.presets import PRESETS, preset
from fastbert.training.pretrain import PretrainConfig

WORDS = ["pretrain", "text", "--tokenizer", "tok", "--out", "run"]


def config(*words: str) -> PretrainConfig:
    return pretrain_config(_parser().parse_args([*WORDS, *words], argparse.Namespace(words=[])))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run_with_its_source(name):
    found = config("--preset", name, "--budget", "3B")
    assert re.search(r"arXiv:\d{4}\.\d{5}", PRESETS[name].source)
    for field, value in PRESETS[name].fields.items():
        assert getattr(found, field) == value
    # what the loop and the stream refuse is refused here
    loop = found.loop()
    assert loop.clip_norm == found.clip_norm
    found.stream(torch.device("cpu"))
    assert found.encoder(30522).num_hidden_layers >= 12
    growth = found.curriculum()
    batches = sum(growth.accumulation_at(step) for step in range(found.max_steps))
    # to a step, or to the rounding of batches that grow
    slack = found.accumulation + (found.max_steps if found.ramp_share else 0)
    assert abs(batches - 3e9 / found.token_budget) <= slack


def test_flags_change_a_preset_and_nothing_else():
    found = config("--preset", "roberta", "--size", "mini", "--seed", "7")
    assert (found.size, found.seed, found.learning_rate) == ("mini", 7, 6e-4)
    assert found.max_steps == 500_000
    assert config("--preset", "roberta", "--max-steps", "5").max_steps == 5
    # a default that is spelt out wins as well
    assert config("--preset", "modernbert", "--mask-probability", "0.15").mask_probability == 0.15


def test_without_a_preset_the_defaults_stand():
    assert config("--max-steps", "5") == PretrainConfig(out="run", max_steps=5)


def test_budgets():
    assert config("--budget", "90m").max_minutes == 90.0
    assert config("--budget", "2h").max_minutes == 120.0
    found = config("--budget", "1M", "--token-budget", "1000", "--accumulation", "10")
    assert found.max_steps == 100 and found.max_minutes is None
    for words in (["--max-steps", "3"], ["--max-minutes", "3"]):
        with pytest.raises(InputError, match="--budget: give it, or --max-steps"):
            config("--budget", "1M", *words)
    for text in ("", "10", "m", "-3m", "0h", "3b", "1e9B"):
        with pytest.raises(InputError, match="--budget must be time"):
            config(f"--budget={text}")


def test_under_a_budget_of_time_a_recipe_does_not_grow_by_steps():
    found = config("--preset", "bert-original", "--budget", "4h")
    assert found.curriculum().seq_len_at(0) == 512 and found.loop().accumulation_at(0) == 8
    steps = config("--preset", "bert-original", "--budget", "3B").curriculum()
    assert steps.seq_len_at(0) == 128 and steps.accumulation_at(0) == 2
    with pytest.raises(InputError, match="--first-seq-len needs --max-steps"):
        config("--preset", "bert-original", "--budget", "4h", "--first-seq-len", "64").loop()


def test_unknown_presets():
    with pytest.raises(InputError, match="--preset must be one of bert-original, roberta"):
        preset("gpt")
