"""The whole way on one machine: from text that every Python carries to a classifier."""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastbert.config import EncoderConfig
from fastbert.data.python_docs import (
    LabelledTask,
    PyDoc,
    collect,
    labelled_task,
    pretraining_texts,
)
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForSequenceClassification
from fastbert.tasks.fill_mask import fill_mask
from fastbert.tasks.table import Row
from fastbert.tokenizer import Tokenizer, train_tokenizer
from fastbert.training.finetune import FinetuneConfig, finetune_from
from fastbert.training.meter import CURVES_FILE, METRICS_FILE
from fastbert.training.pretrain import (
    MODEL_FOLDER,
    REPORT_FILE,
    PretrainConfig,
    pretrain_corpus,
    write_report,
)
from fastbert.training.run_folder import RUN_FILE, check_run, claim_run

VOCAB_SIZE = 8192
MAX_SEQ_LEN = 128
HELDOUT_SHARE = 0.03
FINETUNE_LABELS, FINETUNE_STEPS, FINETUNE_SEQ_LEN = 250, 128, 64
# each start at the peak that served it best of 3e-4 to 4e-3, with Muon and with AdamW
PEAK_PRETRAINED, PEAK_SCRATCH = 1e-3, 2e-3
CLASSIFIER_FOLDER = "classifier"
SENTENCES = (
    "Returns the number of [MASK] in the list.",
    "Raise a ValueError if the [MASK] is not valid.",
    "This function returns a new [MASK] with the same shape as the input.",
    "The default value is [MASK].",
    "Compute the shortest [MASK] between two nodes of the graph.",
)


@dataclass
class Stages:
    """How long each stage took."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.say(f"\n[{len(self.seconds) + 1}/6] {title}")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


def run_demo(
    out: str,
    minutes: float,
    *,
    size: str = "mini",
    seed: int = 0,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Text, vocabulary, pre-training, scores, fine-tuning, blanks; see the README.

    Args:
        out: folder of the run.
        minutes: of pre-training.
        size: of the encoder.
        seed: of everything random.
        fresh: replace an earlier demo in `out`.
        say: told what happens.

    Returns:
        The report, as written to `report.json`; empty where the run was interrupted.

    Raises:
        InputError: bad settings, or a folder that holds something else.
    """
    if not minutes > 0 or not math.isfinite(minutes):
        raise InputError(f"--minutes must be more than 0, got {minutes}")
    config = demo_config(out, minutes, size, seed)
    config.loop()
    config.encoder(VOCAB_SIZE)
    if fresh:
        _remove_demo(Path(out))
    elif (Path(out) / RUN_FILE).exists():
        raise InputError(f"--out {out}: holds a run already; --fresh replaces an earlier demo")
    settings = {"command": "demo", "minutes": minutes, "size": size, "seed": seed}
    check_run(out, settings, resume=False)
    folder = claim_run(out, settings, resume=False)
    stages = Stages(say)
    with stages.stage("text", "text: docstrings of the libraries installed here"):
        docs = collect(say=say)
        task = labelled_task(docs, train_size=FINETUNE_LABELS, seed=seed)
        texts = pretraining_texts(docs, task)
        say(_describe(docs, texts, task))
    with stages.stage("tokenizer", f"vocabulary: WordPiece, {VOCAB_SIZE:,} tokens"):
        tokenizer = train_tokenizer(texts, VOCAB_SIZE)
        corpus = TokenizedCorpus.build(texts, tokenizer)
        train_corpus, heldout_corpus = corpus.split(HELDOUT_SHARE, seed)
        say(f"{corpus.tokens:,} tokens, {heldout_corpus.tokens:,} of them held out")
    with stages.stage("pretrain", f"pre-training: {minutes:g} minutes, and held-out scores"):
        scores = pretrain_corpus(train_corpus, heldout_corpus, tokenizer, config, folder, say=say)
    if not scores:
        say("a demo does not resume; --fresh starts it anew")
        return {}
    report = {
        "mlm_loss_heldout": scores["mlm_loss_heldout"],
        "unigram_loss_heldout": scores["unigram_loss_heldout"],
        "masked_accuracy_heldout": scores["masked_accuracy_heldout"],
        "sop_accuracy": scores["pair_accuracy_heldout"],
    }
    with stages.stage("finetune", "fine-tuning: which library does a docstring document?"):
        report |= compare_classifiers(folder, task, seed, say)
    with stages.stage("fill_mask", "what the model thinks"):
        _show_blanks(folder / MODEL_FOLDER, tokenizer, say)
    report |= {
        name: scores[name]
        for name in ("real_tokens_per_s", "packing_efficiency", "steps", "tokens")
    }
    report["peak_rss_gib"] = round(_peak_rss_gib(), 3)
    report["seconds"] = stages.seconds
    with stages.stage("report", "on disk"):
        write_report(folder, report)
        say(_contents(folder))
    return report


def demo_config(out: str, minutes: float, size: str, seed: int) -> PretrainConfig:
    """The recipe of a few minutes: no dropout, since the text is seen about once."""
    return PretrainConfig(
        out=out,
        size=size,
        objective="mlm+sop",
        max_minutes=minutes,
        token_budget=2048,
        max_seq_len=MAX_SEQ_LEN,
        dropout=0.0,
        seed=seed,
        evaluate_minutes=1.0,
        checkpoint_minutes=max(minutes, 1.0),
    )


def compare_classifiers(
    folder: Path, task: LabelledTask, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Fine-tune the pre-trained model and one from random weights: same labels, same steps."""
    model = str(folder / MODEL_FOLDER)
    tokenizer = Tokenizer.from_pretrained(model)
    rows, held_out = (
        [Row(text, label) for text, label in part] for part in (task.train, task.evaluation)
    )
    labels = sorted(set(task.labels))
    # dropout serves where few labels are seen often
    saved = EncoderConfig.from_pretrained(model)
    architecture = replace(
        saved, labels=labels, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    pretrained = BertForSequenceClassification.from_pretrained(
        model, config=architecture, new_heads=True, seed=seed
    )
    scratch = BertForSequenceClassification.from_config(architecture, seed)
    # the pooler that sentence order has shaped serves this task less well than a fresh one
    fresh = {n: t for n, t in scratch.state_dict().items() if n.startswith("pooler.")}
    pretrained.load_state_dict(fresh, strict=False)
    reports = {}
    for name, classifier, peak in (
        ("pre-trained", pretrained, PEAK_PRETRAINED),
        ("from scratch", scratch, PEAK_SCRATCH),
    ):
        config = FinetuneConfig(
            model=model,
            train="",
            eval="",
            out=str(folder),
            max_steps=FINETUNE_STEPS,
            max_seq_len=FINETUNE_SEQ_LEN,
            optimizer="muon",
            learning_rate=peak,
            evaluate_epochs=0,
            keep_best=False,
            seed=seed,
        )
        run = folder / "finetune" / name.replace(" ", "-")
        run.mkdir(parents=True)
        reports[name] = finetune_from(
            classifier, tokenizer, rows, held_out, config, run, label=name, say=lambda _: None
        )
        if not reports[name]:
            raise KeyboardInterrupt
    (folder / "finetune" / "pre-trained" / MODEL_FOLDER).rename(folder / CLASSIFIER_FOLDER)
    shutil.rmtree(folder / "finetune" / "from-scratch" / MODEL_FOLDER)
    ours, theirs = reports["pre-trained"], reports["from scratch"]
    say(f"{len(rows)} labelled docstrings, {FINETUNE_STEPS} steps, {len(held_out):,} to score on:")
    say("                 accuracy  macro-F1")
    say(f"  pre-trained      {ours['accuracy']:6.1%}    {ours['macro_f1']:6.1%}")
    say(f"  from scratch     {theirs['accuracy']:6.1%}    {theirs['macro_f1']:6.1%}")
    say(f"  majority class   {ours['majority']:6.1%}")
    return {
        "classifier_accuracy": ours["accuracy"],
        "classifier_macro_f1": ours["macro_f1"],
        "classifier_accuracy_from_scratch": theirs["accuracy"],
        "classifier_macro_f1_from_scratch": theirs["macro_f1"],
        "classifier_majority": ours["majority"],
    }


def _show_blanks(model: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    found = fill_mask(BertForMaskedLM.from_pretrained(model), tokenizer, SENTENCES)
    for sentence, blanks in zip(SENTENCES, found, strict=True):
        say(sentence)
        for blank in blanks:
            say("    " + "  ".join(f"{word} {share:.1%}" for word, share in blank.words))


def _describe(docs: Sequence[PyDoc], texts: Sequence[str], task: LabelledTask) -> str:
    counts = Counter(doc.library for doc in docs)
    libraries = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    megabytes = sum(len(doc.text) for doc in docs) / 1e6
    return (
        f"{len(docs):,} docstrings, {megabytes:.1f} MB: {libraries}\n"
        f"{len(texts):,} to pre-train on; {len(task.evaluation):,} to score the classifier on, "
        "they and their near-duplicates kept apart"
    )


def _remove_demo(folder: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    run_file = folder / RUN_FILE
    if folder.is_symlink():
        raise InputError(f"--out {folder}: is a link, which --fresh does not replace")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        command = json.loads(run_file.read_text(encoding="utf-8")).get("command")
    except (OSError, ValueError, AttributeError):
        command = None
    if command != "demo":
        raise InputError(f"--out {folder}: not a demo's folder, so --fresh does not replace it")
    shutil.rmtree(folder)


def _contents(folder: Path) -> str:
    shown = (
        (f"{MODEL_FOLDER}/", "the pre-trained BERT; transformers loads it"),
        (
            f"{CLASSIFIER_FOLDER}/",
            "the classifier: fastbert predict --model " + str(folder / CLASSIFIER_FOLDER),
        ),
        (CURVES_FILE, "loss, accuracy, learning rate and throughput"),
        (METRICS_FILE, "the same as records"),
        (REPORT_FILE, "the scores"),
    )
    # the picture needs matplotlib
    return "\n".join(
        f"  {folder / name}  {what}" for name, what in shown if (folder / name).exists()
    )


def _peak_rss_gib() -> float:
    # kilobytes on Linux, bytes on a Mac
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
