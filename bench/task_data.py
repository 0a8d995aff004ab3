"""Public data in the layouts that tasks read: TREC, Cranfield, choices from SQuAD; and BM25."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastbert.data.text_files import decoded_lines
from fastbert.metrics.ranking import ranking_scores
from fastbert.tasks.groups import Groups, read_groups
from fastbert.tasks.records import FileFormat
from fastbert.tasks.squad import read_questions

# queries of Cranfield to train on, the rest is scored on
_TRAINED_ON = 150
_WORD = re.compile(r"[a-z0-9]+")
# documents of BM25 that a reranker orders anew
_FIRST = 50
# irrelevant ones of them beside the text that a title stands over
_BESIDE = 7


class Files(NamedTuple):
    """What a case trains on, chooses its model on, and is scored on where that is another file."""

    train: Path
    evaluation: Path
    test: Path | None = None


def trec(data: Path, folder: Path) -> Files:
    """The six coarse classes; the files are in ISO-8859-1, without a header."""
    written = []
    for name in ("TREC.train", "TREC.test"):
        lines = decoded_lines(data / "classification" / "trec6" / name, "iso-8859-1")
        rows = [line.text.partition(" ") for line in lines if line.text.strip()]
        out = folder / f"{name.lower().replace('.', '-')}.tsv"
        table = [f"{label.partition(':')[0]}\t{text}" for label, _, text in rows]
        out.write_text("\n".join(["label\ttext", *table]) + "\n", encoding="utf-8")
        written.append(out)
    return Files(*written)


def choices_of_squad(data: Path, folder: Path) -> Files:
    """Which of four passages answers a question: its own, or three others of the same file."""
    written = []
    for name, out in (
        ("train-v1.1.first12articles.json", "train"),
        ("dev-v1.1.16articles_from_v2.json", "dev"),
    ):
        rows, _ = read_questions(data / "qa" / "squad_v1.1" / name)
        passages = list(dict.fromkeys(row.context for row in rows))
        rng = np.random.default_rng(0)
        lines = []
        for row in rows:
            drawn = [passages[n] for n in rng.choice(len(passages), 4, replace=False)]
            others = [passage for passage in drawn if passage != row.context][:3]
            label = int(rng.integers(4))
            choices = [*others[:label], row.context, *others[label:]]
            fields = {"question": row.question, "choices": choices, "label": label}
            lines.append(json.dumps(fields))
        path = folder / f"{out}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        written.append(path)
    return Files(*written)


@dataclass(frozen=True)
class Cranfield:
    """The collection.

    Attributes:
        documents: title and text by number.
        queries: in the file's order, from 1, by which judgements name them.
        gains: a query's judged documents; 4 for a complete answer down to 1. The code -1, once a
            query and not explained anywhere, is taken for no judgement.
    """

    documents: dict[str, tuple[str, str]]
    queries: dict[str, str]
    gains: dict[str, dict[str, float]]

    @classmethod
    def read(cls, data: Path) -> Cranfield:
        """Read its three files."""
        folder = data / "retrieval" / "cranfield"
        documents = {}
        for fields in _entries(folder / "cran.all.1400"):
            title, text = fields.get("T", ""), fields.get("W", "")
            documents[fields["I"]] = (title, text.removeprefix(title).strip())
        queries = {
            str(number): fields["W"]
            for number, fields in enumerate(_entries(folder / "cran.qry"), 1)
        }
        gains: dict[str, dict[str, float]] = {}
        for line in decoded_lines(folder / "cranqrel"):
            judged = line.text.split()
            if len(judged) == 3 and int(judged[2]) > 0:
                gains.setdefault(judged[0], {})[judged[1]] = 5.0 - int(judged[2])
        return cls(documents, queries, gains)


def _entries(path: Path) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    key = ""
    for line in decoded_lines(path):
        if line.text.startswith(".I"):
            if fields:
                yield fields
            fields, key = {"I": str(int(line.text.split()[1]))}, ""
        elif re.fullmatch(r"\.[TABW]\s*", line.text):
            key = line.text[1]
        elif key:
            fields[key] = f"{fields.get(key, '')} {line.text}".strip()
    if fields:
        yield fields


def cranfield_pairs(data: Path, folder: Path) -> Files:
    """Queries with a relevant document each to train on, a collection of others to score on."""
    whole = Cranfield.read(data)
    pairs = [
        {"query": whole.queries[query], "positive": " ".join(whole.documents[document]).strip()}
        for query in list(whole.queries)[:_TRAINED_ON]
        for document in whole.gains.get(query, {})
        if document in whole.documents
    ]
    train = folder / "train.jsonl"
    _write_lines(train, pairs)
    held_out = folder / "collection"
    held_out.mkdir(exist_ok=True)
    _write_collection(held_out, whole, list(whole.queries)[_TRAINED_ON:])
    return Files(train, held_out)


def _write_collection(folder: Path, whole: Cranfield, queries: Sequence[str]) -> None:
    _write_lines(
        folder / "corpus.jsonl",
        [{"_id": n, "title": t, "text": text} for n, (t, text) in whole.documents.items()],
    )
    _write_lines(
        folder / "queries.jsonl",
        [{"_id": query, "text": whole.queries[query]} for query in queries],
    )
    judged = [
        f"{query}\t{document}\t{gain:g}"
        for query in queries
        for document, gain in whole.gains.get(query, {}).items()
    ]
    lines = ["query-id\tcorpus-id\tscore", *judged]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cranfield_lists(data: Path, folder: Path) -> Files:
    """Lists of passages: the judged ones and BM25's first, to train on and to order anew.

    150 queries are few: titles are trained on as well, as queries for the texts under them
    (MacAvaney et al. 2019, "Content-Based Weak Supervision for Ad-Hoc Re-Ranking").
    """
    whole = Cranfield.read(data)
    texts = {name: " ".join(parts).strip() for name, parts in whole.documents.items()}
    engine = BM25(list(texts.values()))
    names = list(texts)
    written = []
    for out, queries in (
        ("train", list(whole.queries)[:_TRAINED_ON]),
        ("held-out", list(whole.queries)[_TRAINED_ON:]),
    ):
        rows: list[dict[str, Any]] = []
        for query in queries:
            gains = whole.gains.get(query, {})
            found = [names[n] for n in engine.rank(whole.queries[query])[:_FIRST]]
            # in training every relevant one is shown, in scoring only what the first stage found
            listed = found if out == "held-out" else [*gains, *(n for n in found if n not in gains)]
            listed = [name for name in listed if texts.get(name)]
            if any(name in gains for name in listed):
                labels = [gains.get(name, 0.0) for name in listed]
                passages = [texts[name] for name in listed]
                rows.append({"query": whole.queries[query], "passages": passages, "labels": labels})
        if out == "train":
            rows += _titled_lists(whole)
        path = folder / f"{out}.jsonl"
        _write_lines(path, rows)
        written.append(path)
    return Files(*written)


def _titled_lists(whole: Cranfield) -> Iterator[dict[str, Any]]:
    """Of documents under one title the first."""
    texts: dict[str, str] = {}
    for title, text in whole.documents.values():
        if title and text:
            texts.setdefault(title, text)
    titles = list(texts)
    engine = BM25(list(texts.values()))
    rng = np.random.default_rng(0)
    for own, title in enumerate(titles):
        found = [number for number in engine.rank(title)[:_FIRST] if number != own]
        others = rng.permutation(found)[:_BESIDE]
        passages = [texts[title], *(texts[titles[number]] for number in others)]
        yield {"query": title, "passages": passages, "labels": [1.0] + [0.0] * len(others)}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class BM25:
    """Okapi's ranking function (Robertson and Zaragoza 2009), k1 = 1.2 and b = 0.75."""

    def __init__(self, documents: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        counts = [Counter(_WORD.findall(text.lower())) for text in documents]
        lengths = np.array([count.total() for count in counts], dtype=np.float64)
        seen = Counter(word for count in counts for word in count)
        total = len(documents)
        self.weight: dict[str, dict[int, float]] = {}
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        for number, count in enumerate(counts):
            for word, times in count.items():
                idf = math.log(1 + (total - seen[word] + 0.5) / (seen[word] + 0.5))
                share = times * (k1 + 1) / (times + norm[number])
                self.weight.setdefault(word, {})[number] = idf * share
        self.total = total

    def rank(self, query: str) -> list[int]:
        """Numbers of all documents, best first; equal ones in their order."""
        scores = np.zeros(self.total)
        for word in _WORD.findall(query.lower()):
            for number, weight in self.weight.get(word, {}).items():
                scores[number] += weight
        return [int(number) for number in np.argsort(-scores, kind="stable")]


def bm25_figures(folder: Path) -> dict[str, float]:
    """BM25's scores on a collection."""
    rows: Groups = read_groups(folder, FileFormat())
    names = [row.id for row in rows[rows.queries :]]
    engine = BM25([row.texts[0] for row in rows[rows.queries :]])
    ranked = {
        row.id: [names[number] for number in engine.rank(row.texts[0])[:100]]
        for row in rows[: rows.queries]
    }
    return ranking_scores(ranked, rows.gains)
