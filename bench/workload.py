"""What a training step computes: a model's size, sequences of uneven length, masked tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastbert.bench.distributions import lengths_of
from fastbert.config import EncoderConfig
from fastbert.data.stream import MASKED_STEP, SEQUENCE_STEP
from fastbert.packing import Capacity, Examples, PackedBatch

CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 999


@dataclass(frozen=True)
class Workload:
    """What all sides compute.

    Attributes:
        size: of the model, by name.
        lengths: a distribution of `fastbert.bench.distributions`.
        longest: cuts what is longer.
    """

    size: str = "mini"
    vocab_size: int = 30522
    sequences: int = 32
    lengths: str = "sentences"
    longest: int = 512
    mask_probability: float = 0.15
    seed: int = 0

    def config(self) -> EncoderConfig:
        """The model, without dropout, so that both sides compute the same."""
        return EncoderConfig.named(
            self.size,
            vocab_size=self.vocab_size,
            max_position_embeddings=max(512, self.longest),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def drawn(self) -> np.ndarray:
        """[sequences] int64."""
        return np.minimum(lengths_of(self.lengths, self.sequences, self.seed), self.longest)

    def examples(self) -> Examples:
        """[CLS] words [SEP], words drawn evenly; [MASK] at every chosen place."""
        return masked_examples(self.drawn(), self.vocab_size, self.mask_probability, self.seed)


def masked_examples(
    lengths: np.ndarray, vocab_size: int, mask_probability: float, seed: int = 0
) -> Examples:
    """Sequences of these lengths with masked positions and their labels."""
    rng = np.random.default_rng([seed, 1])
    first_word = min(FIRST_WORD, vocab_size // 2)
    ids, positions, start = [], [], 0
    for length in lengths:
        words = rng.integers(first_word, vocab_size, length - 2)
        ids.append([CLS, *words.tolist(), SEP])
        count = max(1, round(mask_probability * (length - 2)))
        positions += sorted((start + 1 + rng.permutation(length - 2)[:count]).tolist())
        start += length
    examples = Examples.from_lists(ids)
    examples.masked_positions = np.asarray(positions, dtype=np.int64)
    examples.labels = examples.input_ids[positions]
    examples.input_ids[positions] = MASK
    return examples


def packed(examples: Examples, chosen: np.ndarray | None = None) -> PackedBatch:
    """A micro-batch with the slots the pre-training stream gives it: sequences and masked rows
    rounded up. The stream is full to about 99.5 %; here it holds the real tokens and no tail."""
    chosen = np.arange(len(examples)) if chosen is None else chosen
    masked = int(examples.num_masked[chosen].sum())
    capacity = Capacity(
        tokens=int(examples.lengths[chosen].sum()),
        sequences=-(-len(chosen) // SEQUENCE_STEP) * SEQUENCE_STEP,
        masked=-(-masked // MASKED_STEP) * MASKED_STEP,
    )
    return examples.batch(chosen, capacity)


def part_of(examples: Examples, chosen: Sequence[int] | np.ndarray) -> Examples:
    """Some of the sequences, as examples of their own."""
    batch = examples.batch(chosen)
    assert batch.masked_positions is not None and batch.labels is not None
    return Examples(
        batch.input_ids.numpy(),
        batch.token_type_ids.numpy(),
        batch.cu_seqlens.numpy().astype(np.int64),
        batch.masked_positions.numpy(),
        batch.labels.numpy(),
    )


def layer_operations(config: EncoderConfig, lengths: np.ndarray) -> float:
    """Of one layer's forward pass: products, attention by the sum of squared lengths."""
    counted = lengths.astype(np.float64)
    hidden = config.hidden_size
    linear = 2 * hidden * (4 * hidden + 2 * config.intermediate_size)
    return float(counted.sum() * linear + 4 * hidden * np.square(counted).sum())


def step_operations(config: EncoderConfig, lengths: np.ndarray, masked: int) -> float:
    """Of one masked-LM training step: three times the forward pass's products; padding and the
    logits of tokens without a target are nobody's work."""
    layers = config.num_hidden_layers * layer_operations(config, lengths)
    head = masked * 2 * config.hidden_size * (config.hidden_size + config.vocab_size)
    return float(3 * (layers + head))
