"""Held-out scores of a pre-trained model, beside what needs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastbert.config import refuse_foreign_tokenizer
from fastbert.data.corpus import read_documents
from fastbert.data.loader import one_pass
from fastbert.data.objectives import Objective
from fastbert.data.regions import Part
from fastbert.data.stream import StreamConfig, heldout_batches
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining, resolve_model
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.tokenizer import Tokenizer
from fastbert.training.detection import GENERATOR_FOLDER, ReplacedTokenPretraining
from fastbert.training.loop import autocast, compute_dtype, default_device

# masks and pairs of held-out text are the same in every evaluation
HELDOUT_SEED = 20_180_411
_TOKENS_AT_ONCE = 4096


def heldout(
    corpus: TokenizedCorpus, tokenizer: Tokenizer, objective: Objective, max_seq_len: int
) -> list[PackedBatch]:
    """Batches to score on: 15 % masked, whatever training masks."""
    config = StreamConfig(
        objective, max(_TOKENS_AT_ONCE, max_seq_len), max_seq_len, seed=HELDOUT_SEED
    )
    return heldout_batches(corpus, tokenizer, config)


def heldout_pass(
    corpus: TokenizedCorpus, tokenizer: Tokenizer, objective: Objective, max_seq_len: int
) -> list[PackedBatch]:
    """As `heldout`, with every draw a function of the sample's index."""
    config = StreamConfig(
        objective, max(_TOKENS_AT_ONCE, max_seq_len), max_seq_len, seed=HELDOUT_SEED
    )
    return one_pass([Part.whole(corpus)], tokenizer, config)


def evaluate_text(
    model_path: str,
    sources: list[str],
    *,
    doc_sep: str = "auto",
    objective: str | None = None,
    max_seq_len: int | None = None,
    dtype: str = "auto",
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Score a saved model on text files.

    Args:
        model_path: a run of `fastbert pretrain`, or a model folder.
        sources: files, globs or folders.
        doc_sep: how documents are separated.
        objective: None for the one the model was trained by.
        max_seq_len: None for the model's.
        dtype: of matrix products: auto, fp32 or bf16.
        say: told what the reader guesses.

    Returns:
        As `evaluate_pretraining`, and unigram_loss: that of this text's own frequencies.

    Raises:
        InputError: bad files, or a model without the heads the objective needs.
    """
    folder = resolve_model(model_path)
    trained_by, trained_len = Objective.load(folder)
    wanted = Objective.parse(objective) if objective else trained_by
    if wanted.detection:
        raise InputError(
            f"{folder}: a discriminator predicts no tokens; name its {GENERATOR_FOLDER} folder"
        )
    device = default_device()
    architecture = BertForPreTraining if wanted.pair else BertForMaskedLM
    model = architecture.from_pretrained(folder).to(device)
    length = max_seq_len if max_seq_len is not None else trained_len
    length = model.config.max_seqlen if length is None else length
    if length > model.config.max_seqlen:
        raise InputError(
            f"--max-seq-len must be at most {model.config.max_seqlen}, "
            f"the model's positions, got {length}"
        )
    tokenizer = Tokenizer.from_pretrained(folder)
    refuse_foreign_tokenizer(tokenizer.vocab_size, model.config, str(folder))
    documents = read_documents(sources, doc_sep=doc_sep, say=say)
    corpus = TokenizedCorpus.build((d.text for d in documents), tokenizer)
    if wanted.pair == "nsp" and corpus.documents < 2:
        say("one document: next-sentence pairs need another, so masked LM alone is scored")
        wanted = Objective()
    batches = heldout_pass(corpus, tokenizer, wanted, length)
    figures = evaluate_pretraining(model, batches, compute_dtype(dtype, device))
    unigram = unigram_log_probabilities([corpus], tokenizer.vocab_size)
    return {**figures, "unigram_loss": unigram_loss(batches, unigram)}


def unigram_log_probabilities(corpora: Sequence[TokenizedCorpus], vocab_size: int) -> np.ndarray:
    """[vocab_size] float64: how often each id occurs, one added to every count."""
    counts = np.ones(vocab_size)
    for corpus in corpora:
        counts += corpus.unigram_counts(vocab_size)
    return np.log(counts / counts.sum())


def evaluate_pretraining(
    model: BertForPreTraining | BertForMaskedLM | ReplacedTokenPretraining,
    batches: Sequence[PackedBatch],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Score the masked-LM and the pair objective.

    Args:
        model: with a masked-LM head, and that of the pairs where the batches have some.
        batches: masked and labelled, on the host.
        dtype: of matrix products.

    Returns:
        mlm_loss (nats a target), masked_accuracy, and pair_accuracy where there are pairs; for
        replaced-token detection replaced_loss and replaced_accuracy.

    Raises:
        InputError: the batches hold no target.
    """
    masked = sum(batch.num_masked for batch in batches)
    if not masked:
        raise InputError(
            "held-out text: no token to predict; every token of it is special, such as [UNK]: "
            "is it in the language of the vocabulary?"
        )
    device = next(model.parameters()).device
    loss = correct = pairs_correct = pairs_loss = 0.0
    with torch.no_grad(), autocast(device, dtype):
        for batch in batches:
            output = model(batch.to(device))
            loss += float(output.masked_lm_loss_sum)
            correct += float(output.masked_lm_correct)
            if output.sequence_correct is not None:
                pairs_correct += float(output.sequence_correct)
                pairs_loss += float(output.sequence_loss_sum)
    pairs = sum(batch.num_labelled for batch in batches)
    figures = {"mlm_loss": loss / masked, "masked_accuracy": correct / masked}
    if pairs and isinstance(model, ReplacedTokenPretraining):
        figures["replaced_loss"] = pairs_loss / pairs
        figures["replaced_accuracy"] = pairs_correct / pairs
    elif pairs:
        figures["pair_accuracy"] = pairs_correct / pairs
    return figures


def unigram_loss(batches: Sequence[PackedBatch], log_probabilities: np.ndarray) -> float:
    """Nats a target, at the same masked positions, of always predicting the unigram."""
    labels = np.concatenate([b.labels.numpy() for b in batches if b.labels is not None])
    return float(-log_probabilities[labels[labels != IGNORE_INDEX]].mean())
