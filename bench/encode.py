"""Texts to vectors with all-MiniLM-L6-v2: ours beside sentence-transformers and ONNX Runtime.

Tokenising counts. fp32 and bf16 are held to the error rule; int8 is not exact, so every row shows
its accuracy: the least cosine to vectors in fp64, and Spearman's correlation on STS-B.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from fastbert.bench import encoders
from fastbert.bench.drop_in_text import read_paragraphs
from fastbert.bench.encoders import Encode
from fastbert.bench.parity import Parity
from fastbert.bench.providers import BF16
from fastbert.bench.public_model import (
    MODEL_PACKAGE,
    SIMILARITY,
    WIKIPEDIA,
    data_file,
    default_model,
)
from fastbert.bench.registry import OURS, Case, Provider, Work
from fastbert.bench.suite import Suite, positive
from fastbert.bench.timing import Step
from fastbert.bench.workload import layer_operations
from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.metrics.correlation import spearman
from fastbert.tokenizer import Tokenizer

PARITY_TEXTS, SIMILARITY_PAIRS = 24, 200
# of OpenMP's libraries; some pin the main thread to one core, by themselves or together
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
NOTES = (
    "sentence-transformers and ONNX Runtime sort by length and take the fastest of batches of 8, "
    "16 and 32; bf16 of sentence-transformers is the whole model in bf16, ours is autocast",
    "ONNX Runtime is driven directly: sentence-transformers' own backend for it needs "
    "optimum-onnx, which takes no transformers 5, and does more work around each call",
)


class Contender:
    """One encoder, loaded when it is first asked.

    Args:
        load: makes it.
        texts: that are timed.
        held_to: what its accuracy is measured on.
    """

    def __init__(self, load: Callable[[], Encode], texts: Sequence[str], held_to: Accuracy) -> None:
        self._load, self._texts, self._held_to = load, texts, held_to

    @functools.cached_property
    def encode(self) -> Encode:
        return self._load()

    def step(self) -> Step:
        return lambda: self.encode(self._texts)

    def figures(self) -> dict[str, float]:
        return self._held_to.figures(self.encode)


class Accuracy:
    """Vectors in fp64 of some texts, and pairs whose similarity people have judged."""

    def __init__(
        self, folder: str, texts: Sequence[str], device: torch.device, *, judged: bool = True
    ) -> None:
        self._folder, self.texts, self._device = folder, texts[:PARITY_TEXTS], device
        path = data_file(SIMILARITY) if judged else None
        self.pairs = [] if path is None else _pairs(str(path))

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """Of sentence-transformers in fp64."""
        return self.peer("fp64")

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def peer(self, dtype: str) -> np.ndarray:
        """Of sentence-transformers."""
        load = encoders.sentence_transformers
        return load(self._folder, dtype, self._device)(self.texts)

    def figures(self, encode: Encode) -> dict[str, float]:
        """Least cosine to the fp64 vectors, and Spearman's correlation where the pairs are."""
        vectors = encode(self.texts).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found = {"least cosine": round(float((vectors * self.exact).sum(axis=1).min()), 6)}
        if self.pairs:
            left = encode([pair[0] for pair in self.pairs])
            right = encode([pair[1] for pair in self.pairs])
            cosines = (left.astype(np.float64) * right).sum(axis=1)
            gold = np.asarray([pair[2] for pair in self.pairs])
            found["STS-B Spearman"] = round(100 * spearman(cosines, gold), 2)
        return found

    def parity(self, encode: Encode, dtype: str) -> Parity:
        """Against sentence-transformers in the same dtype."""
        judged = Parity(encoders.DTYPES[dtype])
        sides = (encode(self.texts), self.peer(dtype), self.exact)
        judged.add(*({"vectors": torch.from_numpy(np.asarray(side))} for side in sides))
        return judged


def refuse_bound(threads: int) -> None:
    """Threads that inherit this one's single core would share it; torch's own do not inherit it.

    Raises:
        InputError: OpenMP has bound this thread to fewer cores than there are to be threads.
    """
    named = [name for name in BINDING if name in os.environ]
    if named and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < threads:
        raise InputError(
            f"{' and '.join(named)} bound the main thread to a core; ONNX Runtime's threads would "
            "all start there and look slow: unset it"
        )


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """One case: the paragraphs through every encoder.

    Raises:
        InputError: no text, or threads bound to cores.
    """
    refuse_bound(options.threads)
    folder = options.model or default_model()
    path = options.text or data_file(WIKIPEDIA)
    if path is None:
        raise InputError(f"--text: name a text file; {WIKIPEDIA} is not among the data sets")
    texts = read_paragraphs(path, max(8, options.paragraphs // (16 if options.quick else 1)))
    with encoders.graphs() as graphs:
        yield _case(options, folder, texts, device, graphs)


def _case(
    options: argparse.Namespace,
    folder: str,
    texts: Sequence[str],
    device: torch.device,
    graphs: dict[str, Path],
) -> Case:
    accuracy = Accuracy(folder, texts, device, judged=not options.quick)
    found: list[Provider] = []

    def add(
        name: str,
        dtype: str,
        load: Callable[[], Encode],
        *needs: str,
        judged: bool = False,
        in_torch: bool = True,
    ) -> None:
        one = Contender(load, texts, accuracy)
        check = (lambda: accuracy.parity(one.encode, dtype)) if judged else None
        wanted = ("sentence_transformers", *needs, *([BF16] if dtype == "bf16" else []))
        found.append(Provider(name, dtype, one.step, check, wanted, one.figures, in_torch))

    peer = encoders.sentence_transformers
    for dtype in ("fp32", "bf16"):
        parts = (folder, dtype, device)
        add(OURS, dtype, functools.partial(encoders.ours, *parts), judged=True)
        add("sentence-transformers", dtype, functools.partial(peer, *parts, texts))
        fast = functools.partial(peer, *parts, texts, accelerated=True)
        add("sentence-transformers, accelerated", dtype, fast, judged=True)
    if device.type == "cpu":
        add(OURS, "int8", functools.partial(encoders.ours, folder, "int8", device))
        # the optimiser and the quantiser take half a minute
        for kind in ("plain",) if options.quick else ("plain", "optimised", "int8"):
            dtype = "int8" if kind == "int8" else "fp32"
            name = "onnxruntime" if kind != "optimised" else "onnxruntime, optimised"
            load = functools.partial(
                encoders.onnx_runtime, folder, kind, options.threads, texts, graphs
            )
            add(name, dtype, load, "onnx", "onnxruntime", in_torch=False)
    lengths, padded = _lengths(folder, texts)
    config = EncoderConfig.from_pretrained(folder)
    operations = config.num_hidden_layers * layer_operations(config, lengths)
    work = Work(int(lengths.sum()), padded, operations)
    conditions = {"model": MODEL_PACKAGE, "texts": len(texts), "longest": encoders.LONGEST}
    name = f"all-MiniLM-L6-v2, {len(texts)} paragraphs of Wikipedia"
    # profiling takes as long as everything else of a quick look
    shares = not options.quick
    return Case("encode", name, work, found, conditions, NOTES, shares_products=shares)


def _lengths(folder: str, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Lengths in tokens, and tokens of batches of 32 in the order of the text."""
    encoded = Tokenizer.from_pretrained(folder).encode_batch(list(texts), literal=True)
    lengths = np.asarray([min(len(ids) + 2, encoders.LONGEST) for ids in encoded])
    parts = (lengths[start : start + 32] for start in range(0, len(lengths), 32))
    return lengths, sum(len(part) * int(part.max()) for part in parts)


def _pairs(path: str) -> list[tuple[str, str, float]]:
    with open(path, encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        read = [(row["sentence1"], row["sentence2"], row["score"]) for row in rows]
    return [(left, right, float(score)) for left, right, score in read[:SIMILARITY_PAIRS]]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a sentence encoder's folder (all-MiniLM-L6-v2)")
    parser.add_argument("--text", help=f"a text file ({WIKIPEDIA} of the data sets)")
    parser.add_argument("--paragraphs", type=positive, default=256, help="(%(default)s)")


SUITE = Suite("encode", __doc__, cases, repeats=5, warm_up=1, add_flags=_add_flags)
main = SUITE.main
