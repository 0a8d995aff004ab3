"""The proof: a training run on kernels is a training run on the reference path.

Real text, dropout on with exact masks, one order of the data. At the end the two losses lie nearer
to each other than runs of different seeds do.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from pydoc_data.topics import topics

import pytest
import torch
from kernel_harness import DEVICE, ON_GPU, runs_kernels
from oracle import SEEDS, ErrorRule

from fastbert.config import EncoderConfig
from fastbert.data.objectives import Objective
from fastbert.data.stream import PretrainingStream, StreamConfig
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.kernels import ops
from fastbert.kernels.ops import Rng
from fastbert.models import BertForPreTraining
from fastbert.packing import PackedBatch
from fastbert.tokenizer import train_tokenizer
from fastbert.training.loss_scale import LossScale
from fastbert.training.optimizer import Optimizers
from fastbert.training.schedule import learning_rate_factor
from fastbert.training.step import Inputs, TrainingStep, backward

pytestmark = runs_kernels

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
# of text that every Python brings along, at each size: vocabulary, topics, tokens a batch
SMALL, LARGE = (256, 12, 96), (4096, None, 2048)


@functools.cache
def batches(vocab_size: int, most: int | None, token_budget: int, steps: int) -> list[PackedBatch]:
    texts = [text for _, text in sorted(topics.items())][:most]
    tokenizer = train_tokenizer(texts, vocab_size)
    corpus = TokenizedCorpus.build(texts, tokenizer)
    config = StreamConfig(
        Objective("sop"),
        token_budget=token_budget,
        max_seq_len=min(128, token_budget // 3),
        fixed_shapes=True,
    )
    return list(itertools.islice(PretrainingStream(corpus, tokenizer, config), steps))


def model_of(seed: int, vocab_size: int, **sizes) -> BertForPreTraining:
    config = EncoderConfig(vocab_size=vocab_size, max_position_embeddings=128, **sizes)
    return BertForPreTraining.from_config(config, seed).to(DEVICE)


def losses(
    backend: str, seed: int, data: list[PackedBatch], dtype: torch.dtype, vocab_size: int, **sizes
) -> list[float]:
    """Masked-LM loss of every step."""
    model = model_of(seed, vocab_size, **sizes)
    optimizers = Optimizers(model, "adamw", learning_rate=2e-3)
    if dtype == torch.float16:
        optimizers.loss_scale = LossScale(torch.device(DEVICE))
    step = TrainingStep(model, optimizers, dtype, clip_norm=1.0)
    found = []
    with ops.use_backend(backend):
        for number, batch in enumerate(data):
            factor = learning_rate_factor("linear", (number + 0.5) / len(data), 0.1)
            result = step([batch], Rng(seed, number, exact=True), factor)
            found.append(result.sums["masked_lm_loss"] / batch.num_masked)
    return torch.stack(found).tolist()


def prove(data: list[PackedBatch], dtype: torch.dtype, last: int, vocab_size: int, **sizes) -> None:
    def end(backend: str, seed: int) -> list[float]:
        return losses(backend, seed, data, dtype, vocab_size, **sizes)

    kernels = end("triton", 0)
    reference = [end("reference", seed) for seed in SEEDS]
    ends = [statistics.fmean(run[-last:]) for run in reference]
    spread = statistics.stdev(ends)
    difference = statistics.fmean(
        ours - theirs for ours, theirs in zip(kernels[-last:], reference[0][-last:], strict=True)
    )
    assert abs(difference) <= spread, f"{difference:.4f} apart, {spread:.4f} between seeds"
    # it was training that was compared
    assert ends[0] < reference[0][0] and kernels != reference[0]


@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_tiny_model_trains_as_on_the_reference_path(steps):
    prove(batches(*SMALL, steps), torch.float32, max(10, steps // 4), SMALL[0], **TINY)


if ON_GPU:
    # hours in the interpreter
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_mini_trains_as_on_the_reference_path(dtype):
        mini = EncoderConfig.named("mini", vocab_size=LARGE[0])
        sizes = {name: getattr(mini, name) for name in TINY}
        prove(batches(*LARGE, 500), dtype, 50, LARGE[0], **sizes)


def test_the_first_steps_loss_and_gradients():
    (batch,) = batches(*SMALL, 1)
    rule = ErrorRule()
    for seed in SEEDS:
        results = []
        for backend, dtype in (
            ("triton", torch.float32),
            ("reference", torch.float32),
            ("reference", torch.float64),
        ):
            model = model_of(seed, SMALL[0], **TINY).to(dtype)
            rng = Rng(seed, 3, exact=True)
            inputs = Inputs.send([batch], rng, torch.device(DEVICE))
            with ops.use_backend(backend):
                sums = backward(model, inputs, torch.float32, rng)
            names = ("masked_lm_loss", "sequence_loss")
            gradients = {name: p.grad for name, p in model.named_parameters()}
            results.append({name: sums[name] for name in names} | gradients)
        for name in results[0]:
            rule.compare(name, *(result[name] for result in results))
    rule.assert_within()
