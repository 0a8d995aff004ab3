from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import SEEDS, ErrorRule
from tiny import stirred, tiny_config, tiny_corpus, tiny_documents, tiny_examples, tiny_tokenizer

from fastbert.data.objectives import Objective
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.errors import InputError
from fastbert.models import BertForMaskedLM, BertForPreTraining
from fastbert.packing import IGNORE_INDEX, Capacity
from fastbert.training.evaluation import (
    evaluate_pretraining,
    evaluate_text,
    heldout,
    unigram_log_probabilities,
    unigram_loss,
)


def model_of(architecture=BertForPreTraining, **fields):
    return stirred(architecture.from_config(tiny_config(**fields)))


def test_unigram_log_probabilities_add_one():
    corpus = TokenizedCorpus(np.array([5, 5, 5, 6], np.uint16), np.array([0, 4]), np.array([0, 1]))
    found = unigram_log_probabilities([corpus], 8)
    assert found.tolist() == np.log(np.array([1, 1, 1, 1, 1, 4, 2, 1]) / 12).tolist()
    assert math.isclose(np.exp(found).sum(), 1.0)


def test_unigram_loss_is_taken_at_the_targets():
    examples = tiny_examples([9, 20, 1])
    batches = [
        examples.batch([0], Capacity(32, 4, 16)),
        examples.batch([1, 2], Capacity(32, 4, 16)),
    ]
    logs = np.log(np.arange(1, 68) / np.arange(1, 68).sum())
    expected = -np.mean([logs[label] for label in examples.labels])
    assert math.isclose(unigram_loss(batches, logs), expected)


def test_scores_are_means_over_all_targets():
    """Batches of unequal size: a mean of means would be another number."""
    rule = ErrorRule()
    for seed in SEEDS:
        examples = tiny_examples([9, 20, 1, 33, 2], seed=seed)
        # every other target is what the model says, so that some are right
        unlabelled = examples.batch(range(5))
        positions = unlabelled.masked_positions[::2]
        unlabelled.labels = unlabelled.sequence_labels = None
        examples.labels[::2] = model_of()(unlabelled).logits[positions].argmax(dim=1).numpy()
        parts = [examples.batch([0]), examples.batch([3, 1, 2, 4], Capacity(64, 8, 32))]
        assert parts[0].num_masked != parts[1].num_masked
        model = model_of()
        figures = evaluate_pretraining(model, parts, torch.float32)
        assert figures.keys() == {"mlm_loss", "masked_accuracy", "pair_accuracy"}
        results = []
        for dtype in (torch.float32, torch.float64):
            whole = examples.batch(range(5))
            labels, positions = whole.labels, whole.masked_positions
            targets = whole.sequence_labels
            whole.labels = whole.masked_positions = whole.sequence_labels = None
            with torch.no_grad():
                output = model.to(dtype)(whole)
            logits = output.logits[positions]
            results.append(F.cross_entropy(logits, labels))
        model.float()
        rule.compare("loss", torch.tensor(figures["mlm_loss"], dtype=torch.float32), *results)
        right = (logits.argmax(dim=1) == labels).sum().item()
        pairs = (output.seq_relationship_logits.argmax(dim=1) == targets).sum().item()
        assert right >= len(labels) / 2 and figures["masked_accuracy"] == right / len(labels)
        assert figures["pair_accuracy"] == pairs / 5
    rule.assert_within()


def test_scoring_leaves_no_gradient_and_draws_no_dropout():
    model = model_of()
    batches = [tiny_examples([9, 20]).batch([0, 1])]
    first = evaluate_pretraining(model.train(), batches, torch.float32)
    assert first == evaluate_pretraining(model, batches, torch.float32)
    assert all(p.grad is None for p in model.parameters())
    assert evaluate_pretraining(model, batches, torch.bfloat16) != first


def test_no_pair_accuracy_without_pairs():
    batch = tiny_examples([9, 20]).batch([0, 1])
    batch.sequence_labels, batch.num_labelled = None, 0
    for architecture in (BertForPreTraining, BertForMaskedLM):
        figures = evaluate_pretraining(model_of(architecture), [batch], torch.float32)
        assert figures.keys() == {"mlm_loss", "masked_accuracy"}


def test_a_model_that_says_the_unigram_has_the_unigram_s_loss():
    tokenizer, corpus = tiny_tokenizer(), tiny_corpus()
    logs = unigram_log_probabilities([corpus], tokenizer.vocab_size)
    model = BertForMaskedLM.from_config(tiny_config(vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        model.masked_lm.norm.weight.zero_()
        model.masked_lm.bias.copy_(torch.from_numpy(logs))
    batches = heldout(corpus, tokenizer, Objective(), 64)
    rule = ErrorRule()
    ours = evaluate_pretraining(model, batches, torch.float32)["mlm_loss"]
    labels = torch.cat([batch.labels for batch in batches])
    losses = torch.from_numpy(-logs)[labels[labels != IGNORE_INDEX]]
    exact = torch.tensor(unigram_loss(batches, logs), dtype=torch.float64)
    rule.compare("loss", torch.tensor(ours, dtype=torch.float32), losses.float().mean(), exact)
    rule.assert_within(seeds=1)


def test_nothing_to_predict_is_said():
    batch = tiny_examples([3]).batch([0])
    batch.labels = torch.full_like(batch.labels, IGNORE_INDEX)
    batch.num_masked = 0
    with pytest.raises(InputError, match="no token to predict"):
        evaluate_pretraining(model_of(), [batch], torch.float32)


def test_heldout_masks_are_the_same_whatever_training_masks():
    tokenizer, corpus = tiny_tokenizer(), tiny_corpus()
    first, again = (heldout(corpus, tokenizer, Objective("sop"), 64) for _ in range(2))
    for left, right in zip(first, again, strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.sequence_labels, right.sequence_labels)


@pytest.fixture
def saved(tmp_path):
    """A model folder and a text file."""
    tokenizer = tiny_tokenizer()
    model = model_of(vocab_size=tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    Objective("sop").save(tmp_path / "run" / "model", 48)
    (tmp_path / "text.txt").write_text("\n\n".join(tiny_documents(9, seed=8)))
    return tmp_path


def test_a_saved_model_on_a_text_file(saved):
    said = []
    options = {"dtype": "fp32", "say": said.append}
    figures = evaluate_text(str(saved / "run"), [str(saved / "text.txt")], **options)
    assert figures.keys() == {"mlm_loss", "masked_accuracy", "pair_accuracy", "unigram_loss"}
    assert 0.0 <= figures["pair_accuracy"] <= 1.0 and figures["unigram_loss"] > 0.0
    folder = str(saved / "run" / "model")
    assert figures == evaluate_text(folder, [str(saved / "text.txt")], **options)
    masked = evaluate_text(folder, [str(saved / "text.txt")], objective="mlm", **options)
    assert masked.keys() == {"mlm_loss", "masked_accuracy", "unigram_loss"}
    assert said


def test_a_sequence_length_past_the_positions(saved):
    with pytest.raises(InputError, match=r"--max-seq-len must be at most 160, .* got 161"):
        evaluate_text(str(saved / "run"), [str(saved / "text.txt")], max_seq_len=161)


def test_pairs_need_a_model_with_that_head(saved):
    model_of(BertForMaskedLM, vocab_size=tiny_tokenizer().vocab_size).save_pretrained(
        saved / "run" / "model"
    )
    with pytest.raises(InputError, match="not a checkpoint of BertForPreTraining"):
        evaluate_text(str(saved / "run"), [str(saved / "text.txt")])
