"""Fine-tuning from other families' checkpoints, and from names on the hub."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from families import their_config
from test_tasks import CASES, Case, config_for, same_as_transformers
from test_tokenizer import foreign_tokenizer
from tiny import WORDS, tiny_tokenizer

from fastbert import pipeline
from fastbert.errors import InputError
from fastbert.tasks.registry import TASKS, make_task
from fastbert.tasks.saved import Saved
from fastbert.tasks.sequences import encode_words
from fastbert.tokenizer import Tokenizer
from fastbert.training import finetune as finetune_module
from fastbert.training.finetune import finetune

transformers = pytest.importorskip("transformers", reason="transformers is in the test extra")

# which tasks each family is put to, all of them by one or another
FAMILIES = {
    "roberta": ("answer",),
    "xlm-roberta": ("similarity", "rerank"),
    "distilbert": ("intent", "choose"),
    "albert": ("relation",),
    "electra": ("classify",),
    "modernbert": ("tag", "embed"),
}
# those whose vocabulary is no WordPiece
KINDS = {"roberta": "BPE", "modernbert": "BPE", "xlm-roberta": "Unigram"}
PAIRS = [(family, task) for family, tasks in FAMILIES.items() for task in tasks]


def checkpoint(family: str, folder: Path) -> Path:
    """transformers' own model of a family, small and random, with a vocabulary of its kind."""
    folder.mkdir()
    tokenizer = tiny_tokenizer()
    if family in KINDS:
        backend = foreign_tokenizer(KINDS[family], [" ".join(WORDS)] * 9)
        backend.save(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    config = their_config(family, **size, max_position_embeddings=40)
    transformers.set_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def case_of(task: str) -> Case:
    return next(case for case in CASES if case.task == task)


def test_every_task_is_tried() -> None:
    assert {task for _, task in PAIRS} == set(TASKS)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_task_from_another_familys_checkpoint(family, name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)
    start, case, rng = (
        checkpoint(family, tmp_path / "start"),
        case_of(name),
        np.random.default_rng(0),
    )
    train, dev = case.write(tmp_path / "train", 80, rng), case.write(tmp_path / "dev", 20, rng)
    out = tmp_path / "run"
    config = config_for(start, train, dev, out, epochs=case.epochs)
    report = finetune(make_task(name, **dict(case.options)), config, say=lambda _: None)
    assert report[case.figure] >= case.least
    saved = Saved.from_pretrained(out)
    rows = saved.task.read(dev, lambda _: None)
    units = saved.build(rows)
    figures = saved.task.score(rows, units, saved.run(units)).figures
    assert figures == {key: report[key] for key in figures}
    if case.auto:
        same_as_transformers(case, out / "model", units)


@pytest.mark.parametrize("prefix", [False, True])
def test_words_get_the_space_that_their_tokens_hold(prefix, tmp_path) -> None:
    from tokenizers import pre_tokenizers

    backend = foreign_tokenizer("BPE")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.save(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    sentences = [["the", "quick", "brown-fox", ",", "café"], ["quick"]]
    found = encode_words(Tokenizer.from_pretrained(tmp_path), sentences)
    for words, (ids, numbers) in zip(sentences, found, strict=True):
        expected = theirs(words, is_split_into_words=True, add_special_tokens=False)
        assert ids.tolist() == expected["input_ids"]
        assert numbers.tolist() == expected.word_ids()
    # in the middle of a text the same word has the same tokens
    assert found[1][0].tolist() == Tokenizer.from_pretrained(tmp_path).encode(" quick")


def test_a_hub_s_name_is_trained_from_and_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune_module, "draw_curves", lambda *_: None)
    start = checkpoint("bert", tmp_path / "start")
    copies = {"somebody/small": start}

    def snapshot_download(name, allow_patterns):
        if name not in copies:
            raise OSError(f"{name} is not cached, and this machine is offline\nand more")
        return str(copies[name])

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    case, rng = case_of("classify"), np.random.default_rng(0)
    train, dev = case.write(tmp_path / "train", 40, rng), case.write(tmp_path / "dev", 8, rng)
    out = tmp_path / "run"
    config = config_for("somebody/small", train, dev, out, epochs=1)
    finetune(make_task("classify"), config, say=lambda _: None)
    copies["somebody/classifier"] = out / "model"
    by_name = pipeline("classify", "somebody/classifier", device="cpu")("river stone")
    assert by_name == pipeline("classify", out, device="cpu")("river stone")
    # without a net it is one line
    with pytest.raises(InputError) as failure:
        pipeline("classify", "somebody/else")
    assert str(failure.value) == (
        "somebody/else: no model here, and not from the hub: "
        "somebody/else is not cached, and this machine is offline"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"somebody/else: no model here, .*'fastbert\[hub\]'"):
        pipeline("classify", "somebody/else")
