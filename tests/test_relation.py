"""Relations that nothing but the order of the two entities tells apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_tasks import config_for, some
from tiny import WORDS, tiny_config, tiny_tokenizer

from fastbert.models import BertModel
from fastbert.tasks.registry import make_task
from fastbert.training import finetune as finetune_module
from fastbert.training.finetune import finetune


def ordered_pairs(path: Path, count: int, rng: np.random.Generator) -> str:
    """The same words either way: the first entity stands before the second, or behind it."""
    blocks = []
    for number in range(1, count + 1):
        marked = [f"<e{k}>{word}</e{k}>" for k, word in enumerate(rng.choice(WORDS, 2), 1)]
        first = bool(rng.integers(2))
        one, two = marked if first else marked[::-1]
        label = "Before(e1,e2)" if first else "Before(e2,e1)"
        text = f"{some(rng, WORDS)} {one} {some(rng, WORDS)} {two} {some(rng, WORDS)}"
        blocks.append(f'{number}\t"{text}"\r\n{label}\r\nComment:\r\n\r\n')
    path.write_text("".join(blocks), newline="")
    return str(path)


def test_order_alone_is_learnt(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)
    start, rng = tmp_path / "start", np.random.default_rng(0)
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size, labels=[])
    BertModel.from_config(config).save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    train = ordered_pairs(tmp_path / "train.txt", 160, rng)
    dev = ordered_pairs(tmp_path / "dev.txt", 60, rng)
    settings = config_for(start, train, dev, tmp_path / "run", learning_rate=1e-3)
    report = finetune(make_task("relation"), settings, say=lambda _: None)
    assert report["accuracy"] >= 0.95 and report["majority"] < 0.7
