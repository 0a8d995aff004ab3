"""A run that is killed again and again: forks a child that goes on with it, and kills that.

    python kill_harness.py KILLS SEED FOLDER TOKENIZER TEXT...

Prints how many children were killed where. The weights of every run that came to its end are
FOLDER/N.safetensors; a run that ends before its kills begins anew. The parent imports everything
once, so that a child costs what its steps cost.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fastbert.data import prepare as preparing
from fastbert.training.pretrain import PretrainConfig, pretrain

STEPS = 14
# of a child's life; short, so that there is much to go on with
LONGEST_LIFE_S = 0.6
CALLS = ("fsync", "replace", "rename", "open")


def config(folder: Path) -> PretrainConfig:
    """A run of a second or two that writes a checkpoint with every step."""
    return PretrainConfig(
        out=str(folder / "run"),
        size="tiny",
        objective="mlm+sop",
        max_steps=STEPS,
        token_budget=256,
        max_seq_len=32,
        accumulation=2,
        checkpoint_minutes=1e-9,
        dtype="fp32",
        dropout=0.1,
        spike_steps=4,
    )


def child(folder: Path, tokenizer: str, text: list[str]) -> None:
    """Start the run, or go on with it, to its end."""
    torch.set_num_threads(1)
    # encoded in this process, so that a kill meets it there
    preparing._cores = lambda: 1
    preparing.BLOCK_CHARACTERS, preparing.SHARD_TOKENS = 4000, 3000
    os.environ["FASTBERT_CACHE"] = str(folder / "cache")
    resume = (folder / "run" / "run.json").exists()
    pretrain(text, tokenizer, config(folder), doc_sep="blank", resume=resume, say=lambda line: None)


def die_at_call(name: str, number: int) -> None:
    """Kill this process in the midst of what it writes."""
    original, count = getattr(os, name), [0]

    def call(*arguments, **options):
        count[0] += 1
        if count[0] >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(os, name, call)


def main() -> None:
    kills, seed = int(sys.argv[1]), int(sys.argv[2])
    folder, tokenizer, text = Path(sys.argv[3]), sys.argv[4], sys.argv[5:]
    draw = random.Random(seed)
    where: Counter[str] = Counter()
    done = finished = 0
    while True:
        by_call = draw.choice(CALLS) if draw.random() < 0.5 else None
        number, life_s = draw.randint(1, 12), draw.uniform(0.0, LONGEST_LIFE_S)
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            if done < kills and by_call:
                die_at_call(by_call, number)
            status = 1
            try:
                child(folder, tokenizer, text)
                status = 0
            except BaseException as failure:
                print(f"a child failed: {type(failure).__name__}: {failure}", flush=True)
            os._exit(status)
        if done < kills and not by_call:
            time.sleep(life_s)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit("a child failed")
            finished += 1
            weights = folder / "run" / "model" / "model.safetensors"
            weights.rename(folder / f"{finished}.safetensors")
            if done >= kills:
                break
            for name in ("run", "cache"):
                shutil.rmtree(folder / name)
            continue
        done += 1
        prepared = any((folder / "cache").rglob("*.bin"))
        steps = len(list((folder / "run" / "checkpoints").glob("step-*")))
        where["training" if steps else "starting" if prepared else "preparing"] += 1
    print(dict(where))


if __name__ == "__main__":
    main()
