"""The cases of `fastbert bench tasks`: which data, which settings, which figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.bench import task_data
from fastbert.bench.task_data import Files


@dataclass(frozen=True)
class TaskCase:
    """One row of the table.

    Attributes:
        name: of the case and of its run's folder.
        task: of `fastbert finetune`.
        needs: what must be in the folder of the data.
        prepare: the files to train and score on, written to the run's folder where they are not
            there as they must be.
        split: that the figures are of.
        shown: figures of the table.
        goal: that was set for it.
        options: of the task.
        settings: of FinetuneConfig.
        before: whether the untrained vectors are scored too.
        peer: whether transformers' Trainer has a model for it, to be timed and scored beside.
    """

    name: str
    task: str
    needs: str
    prepare: Callable[[Path, Path], Files]
    split: str
    shown: tuple[str, ...]
    goal: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    before: bool = False
    peer: bool = False

    def describe(self) -> str:
        """Its data and settings in a few words."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.needs}; {settings}"


def _of(needs: str, train: str, evaluation: str, test: str | None = None) -> Any:
    """Files that are there as they must be."""

    def prepare(data: Path, folder: Path) -> Files:
        base = data / needs
        return Files(base / train, base / evaluation, None if test is None else base / test)

    return prepare


CASES = (
    TaskCase(
        "trec",
        "classify",
        "classification/trec6",
        task_data.trec,
        "test",
        ("accuracy",),
        "accuracy 95",
        settings={"epochs": 6, "learning_rate": 2e-4, "keep_best": False, "evaluate_epochs": 0},
        peer=True,
    ),
    TaskCase(
        "stsb",
        "similarity",
        "pairs/stsb",
        _of("pairs/stsb", "train.tsv", "dev.tsv"),
        "dev",
        ("spearman", "pearson"),
        "Spearman 88",
        settings={"epochs": 4, "max_seq_len": 128, "keep_best": False, "evaluate_epochs": 0},
        before=True,
        peer=True,
    ),
    TaskCase(
        "stsb-cosine",
        "embed",
        "pairs/stsb",
        _of("pairs/stsb", "train.tsv", "dev.tsv"),
        "dev",
        ("spearman", "pearson"),
        "Spearman 88",
        settings={
            "epochs": 2,
            "batch_size": 64,
            "max_seq_len": 128,
            "keep_best": False,
            "evaluate_epochs": 0,
        },
        before=True,
    ),
    TaskCase(
        "snips",
        "intent",
        "slots/snips",
        _of("slots/snips", "train", "dev", "test"),
        "test",
        ("intent_accuracy", "slot_f1", "exact"),
        "intent 97, slot F1 92",
        settings={
            "epochs": 3,
            "batch_size": 64,
            "learning_rate": 3e-4,
            "max_seq_len": 64,
            "freeze": "embeddings",
            "keep_best": False,
            "evaluate_epochs": 0,
        },
    ),
    TaskCase(
        "wnut17",
        "tag",
        "ner/wnut17",
        _of("ner/wnut17", "wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
        "test",
        ("f1", "precision", "recall"),
        "F1 40",
        settings={
            "epochs": 8,
            "learning_rate": 3e-4,
            "max_seq_len": 128,
            "evaluate_epochs": 2,
        },
        peer=True,
    ),
    TaskCase(
        "sst2",
        "classify",
        "classification/sst2",
        _of("classification/sst2", "train.tsv", "dev.tsv"),
        "dev",
        ("accuracy",),
        "accuracy 90",
        settings={
            "epochs": 2,
            "learning_rate": 1e-4,
            "max_seq_len": 128,
            "keep_best": False,
            "evaluate_epochs": 0,
        },
        peer=True,
    ),
    TaskCase(
        "rte",
        "classify",
        "pairs/rte",
        _of("pairs/rte", "train.tsv", "dev.tsv"),
        "dev",
        ("accuracy",),
        "",
        settings={"epochs": 4, "max_seq_len": 256, "keep_best": False, "evaluate_epochs": 0},
        peer=True,
    ),
    TaskCase(
        "semeval",
        "relation",
        "relation/semeval2010_task8",
        _of("relation/semeval2010_task8", "TRAIN_FILE.TXT", "TEST_FILE_FULL.TXT"),
        "test",
        ("macro_f1", "accuracy"),
        "macro-F1 80",
        settings={
            "epochs": 4,
            "batch_size": 64,
            "learning_rate": 3e-4,
            "max_seq_len": 128,
            "freeze": "embeddings",
            "keep_best": False,
            "evaluate_epochs": 0,
        },
    ),
    TaskCase(
        "squad",
        "answer",
        "qa/squad_v1.1",
        _of(
            "qa/squad_v1.1",
            "train-v1.1.first12articles.json",
            "dev-v1.1.16articles_from_v2.json",
        ),
        "dev, 28 %",
        ("exact_match", "f1"),
        "EM and F1 told",
        settings={"epochs": 2, "max_seq_len": 384, "keep_best": False, "evaluate_epochs": 0},
        peer=True,
    ),
    TaskCase(
        "squad-choose",
        "choose",
        "qa/squad_v1.1",
        task_data.choices_of_squad,
        "dev, 28 %",
        ("accuracy",),
        "",
        settings={
            "epochs": 2,
            "max_seq_len": 192,
            "batch_size": 16,
            "keep_best": False,
            "evaluate_epochs": 0,
        },
    ),
    TaskCase(
        "cranfield",
        "embed",
        "retrieval/cranfield",
        task_data.cranfield_pairs,
        "75 held-out queries",
        ("ndcg_at_10", "recall_at_10", "mrr_at_10"),
        "beside BM25",
        settings={
            "epochs": 3,
            "learning_rate": 5e-5,
            "max_seq_len": 256,
            "keep_best": False,
            "evaluate_epochs": 0,
        },
        before=True,
    ),
    TaskCase(
        "cranfield-rerank",
        "rerank",
        "retrieval/cranfield",
        task_data.cranfield_lists,
        "74 held-out queries, BM25's first 50; titles trained on too",
        ("ndcg_at_10", "mrr_at_10"),
        "above BM25's order",
        settings={
            "epochs": 2,
            "max_seq_len": 128,
            "keep_best": False,
            "evaluate_epochs": 0,
        },
        before=True,
    ),
    TaskCase(
        "resume",
        "tag",
        "ner/resume",
        _of("ner/resume", "train.char.bmes", "dev.char.bmes", "test.char.bmes"),
        "test",
        ("f1",),
        "",
        settings={"epochs": 3, "max_seq_len": 192},
    ),
    TaskCase(
        "chnsenticorp",
        "classify",
        "classification/chnsenticorp",
        _of("classification/chnsenticorp", "train.tsv", "dev.tsv", "test.tsv"),
        "test",
        ("accuracy",),
        "",
        settings={"epochs": 2, "max_seq_len": 256},
    ),
)
