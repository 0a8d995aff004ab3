"""Sentence embeddings: contrastive, by scores, or from plain sentences and dropout alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import EncoderConfig
from fastbert.data.text_files import counted
from fastbert.errors import InputError
from fastbert.files import atomic_write
from fastbert.kernels.ops import Rng
from fastbert.metrics.correlation import pearson, spearman
from fastbert.metrics.ranking import ranking_scores
from fastbert.models import BertModel, Targets
from fastbert.tasks.groups import Group, Groups, read_groups
from fastbert.tasks.losses import Loss, Shaping, at_least_one
from fastbert.tasks.pooling import POOLING, pool_tokens
from fastbert.tasks.records import text_field
from fastbert.tasks.saved import load_body
from fastbert.tasks.sequences import join_cut, say_share
from fastbert.tasks.task import Outputs, Raw, Say, Scores, Task, option
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer

# documents of a query that are looked at
DEPTH = 100
_NEAR = 0.1


@dataclass
class Embed(Task):
    """A vector a text, near to those of texts that mean the same."""

    name: ClassVar[str] = "embed"
    summary: ClassVar[str] = (
        "vectors of texts, from pairs, triplets, scored pairs or plain sentences"
    )
    best_by: ClassVar[str] = "best"
    kept: ClassVar[tuple[str, ...]] = ("pooling", "normalise")

    pooling: str = option("mean of the tokens, or cls for the first one", "mean")
    normalise: bool = option("vectors of length 1", True)
    scale: float = option("cosines are multiplied by this before the softmax over a batch", 20.0)
    kind: str = field(default="pairs", init=False)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if self.pooling not in POOLING:
            raise InputError(f"--pooling must be one of {', '.join(POOLING)}, got {self.pooling!r}")
        if self.scale <= 0:
            raise InputError(f"--scale must be more than 0, got {self.scale}")

    @property
    def shaped_by(self) -> tuple[str, ...]:
        return () if self.kind == "scored" else ("label_smoothing",)

    @property
    def has_head(self) -> bool:
        return False

    def read(self, path: str, say: Say) -> Groups:
        found = read_groups(Path(path), self.form)
        what = {"scored": "scored pair", "texts": "text", "collection": "text"}.get(found.kind)
        negatives = max((len(group.texts) for group in found), default=0) > 2
        noun = what or ("triplet" if negatives else "pair")
        say(f"{path}: {counted(len(found), noun)}; {found.remarks}")
        return found

    def fit(self, rows: Sequence[Group], where: str = "training rows") -> None:
        self.kind = _kind(rows)
        if self.kind == "collection":
            raise InputError(f"{where}: a collection is to score on; pairs are to train on")
        if self.kind == "scored":
            scores = [row.score or 0.0 for row in rows]
            self.low, self.high = min(scores), max(scores)
            if self.low == self.high:
                raise InputError(f"{where}: every score is {self.low:g}; nothing can be learnt")

    def check(self, rows: Sequence[Group], where: str = "evaluation rows") -> None:
        if _kind(rows) == "texts":
            raise InputError(
                f"{where}: texts alone cannot be scored on; pairs, scored pairs or a collection can"
            )

    def load(
        self, folder: Path, *, dropout: float | None = None, seed: int = 0
    ) -> tuple[nn.Module, list[str]]:
        return load_body(folder, self, dropout=dropout, seed=seed)

    def restore_model(self, folder: Path) -> nn.Module:
        config = EncoderConfig.from_pretrained(folder)
        return BertModel.from_pretrained(folder, config=config, new_heads=True)

    def restore(self, facts: dict[str, Any], config: EncoderConfig, where: str) -> None:
        super().restore(facts, config, where)
        folder = Path(where).parent
        listed = folder / "modules.json"
        if facts or not listed.is_file():
            return
        try:
            self._restore_modules(folder, config.max_seqlen)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{listed}: unreadable, or a file that it names is: {error!r}"
            ) from None

    def _restore_modules(self, folder: Path, positions: int) -> None:
        """What sentence-transformers does with this folder: old versions' files and new ones'."""
        listed = folder / "modules.json"
        parts = {}
        for part in json.loads(listed.read_text(encoding="utf-8")):
            kind = str(part["type"]).rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize"):
                raise InputError(f"{listed}: vectors go through a {kind}, which is not known here")
            parts[kind] = folder / str(part["path"])
        self.normalise = "Normalize" in parts
        if "Pooling" in parts:
            self.pooling = _pooling_of(parts["Pooling"] / "config.json")
        for name, field_name in (
            ("sentence_bert_config.json", "max_seq_length"),
            ("tokenizer_config.json", "model_max_length"),
        ):
            file = folder / name
            length = (
                json.loads(file.read_text(encoding="utf-8")).get(field_name)
                if file.is_file()
                else None
            )
            if isinstance(length, int):
                self.max_seq_len = min(length, positions)
                return

    def save_model(self, model: Any, folder: Path) -> None:
        """Beside the model, the layout in which sentence-transformers reads it."""
        model.save_pretrained(folder)
        size, kinds = model.config.hidden_size, ("cls_token", "mean_tokens")
        modules = ["Transformer", "Pooling", *(["Normalize"] if self.normalise else [])]
        listed = [
            {
                "idx": number,
                "name": str(number),
                "path": "" if number == 0 else f"{number}_{kind}",
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(modules)
        ]
        pooling = {"word_embedding_dimension": size}
        pooling |= {f"pooling_mode_{kind}": kind.startswith(self.pooling) for kind in kinds}
        (folder / "1_Pooling").mkdir(exist_ok=True)
        for name, content in (
            ("modules.json", listed),
            ("1_Pooling/config.json", pooling),
            ("sentence_bert_config.json", {"max_seq_length": self.max_seq_len}),
        ):
            with atomic_write(folder / name) as file:
                json.dump(content, file, indent=2)
                file.write("\n")

    def build(
        self, rows: Sequence[Group], tokenizer: Tokenizer, *, name: str = "", say: Say | None = None
    ) -> Units:
        length = self.max_seq_len or 512
        # a text alone is its own positive: dropout makes two of it (Gao et al. 2021)
        twice = self.kind == "texts" and isinstance(rows, Groups) and rows.kind == "texts"
        groups = [row.texts * 2 if twice else row.texts for row in rows]
        texts = [text for group in groups for text in group]
        joined = [join_cut(tokenizer, ids, None, length) for ids in tokenizer.encode_batch(texts)]
        cut = sum(was_cut for _, was_cut in joined)
        say_share(say, name, cut, len(texts), "text", f"cut to {length} tokens")
        scored = all(row.score is not None for row in rows)
        values = np.array([[row.score] for row in rows], dtype=np.float32) if scored else None
        return Units(
            [one.input_ids for one, _ in joined],
            [one.token_type_ids for one, _ in joined],
            cu_units=np.cumsum([0, *map(len, groups)]),
            values=values,
        )

    def forward(self, model: Any, batch: TaskBatch, rng: Rng | None = None) -> Outputs:
        vectors = pool_tokens(model.encoder(batch, rng), batch, self.pooling)
        # a loss compares directions; answers may keep lengths
        return Outputs(sequences=F.normalize(vectors, dim=-1) if self.normalise or rng else vectors)

    def loss(self, outputs: Outputs, batch: TaskBatch, targets: Targets, shaping: Shaping) -> Loss:
        assert outputs.sequences is not None and batch.cu_units is not None
        vectors = F.normalize(outputs.sequences.float(), dim=-1)
        if self.kind == "scored":
            assert batch.values is not None
            wanted = (batch.values.squeeze(-1) - self.low) / (self.high - self.low)
            errors = (vectors[0::2] * vectors[1::2]).sum(dim=-1) - wanted
            found = Loss(errors.square().sum(), (errors.abs() < _NEAR).sum())
        else:
            found = in_batch_loss(vectors, batch.cu_units, self.scale, shaping)
        return Loss(found.total / at_least_one(targets.labelled), found.correct)

    def answers(self, rows: Sequence[Group], units: Units, raw: Raw) -> list[dict[str, Any]]:
        assert raw.sequences is not None and units.cu_units is not None
        firsts = raw.sequences[units.cu_units[:-1]]
        return [
            {"text": row.texts[0], "embedding": [round(float(value), 6) for value in vector]}
            for row, vector in zip(rows, firsts, strict=True)
        ]

    def score(self, rows: Sequence[Group], units: Units, raw: Raw) -> Scores:
        assert raw.sequences is not None and units.cu_units is not None
        vectors = raw.sequences.astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors / np.maximum(lengths, 1e-12)
        kind = _kind(rows)
        if kind == "scored":
            cosine = (vectors[0::2] * vectors[1::2]).sum(axis=-1)
            true = np.array([row.score for row in rows], dtype=np.float64)
            return Scores({"spearman": spearman(cosine, true), "pearson": pearson(cosine, true)})
        if kind == "collection":
            assert isinstance(rows, Groups)
            names = [row.id for row in rows]
            queries, documents = vectors[: rows.queries], vectors[rows.queries :]
            ranked = nearest(queries, documents, names[rows.queries :])
            own = dict(zip(names[: rows.queries], ranked, strict=True))
            return Scores(ranking_scores(own, rows.gains))
        anchors = vectors[units.cu_units[:-1]]
        others = np.delete(np.arange(len(vectors)), units.cu_units[:-1])
        texts = [text for row in rows for text in row.texts[1:]]
        # the same text twice is one document
        first = {text: number for number, text in reversed(list(enumerate(texts)))}
        kept = sorted(first.values())
        ranked = nearest(anchors, vectors[others[kept]], [str(number) for number in kept])
        gains = {str(n): {str(first[row.texts[1]]): 1.0} for n, row in enumerate(rows)}
        return Scores(ranking_scores({str(n): names for n, names in enumerate(ranked)}, gains))

    def rank(self, figures: dict[str, float]) -> tuple[float, float]:
        name = "spearman" if "spearman" in figures else "ndcg_at_10"
        return figures[name], figures.get("pearson", figures.get("mrr_at_10", 0.0))

    def rows_of(self, inputs: Sequence[Any], places: Sequence[str]) -> list[Group]:
        rows = []
        for given, place in zip(inputs, places, strict=True):
            if isinstance(given, dict):
                named = next((n for n in ("text", "sentence", "query") if n in given), "text")
                given = text_field(place, given, named)
            if not isinstance(given, str):
                raise InputError(f"{place}: a text is wanted, got {given!r:.60}")
            rows.append(Group((given,)))
        return rows

    def show(self, row: Group) -> str:
        shown = {"texts": list(row.texts), **({} if row.score is None else {"score": row.score})}
        return json.dumps(shown, ensure_ascii=False)


def _pooling_of(path: Path) -> str:
    raw = json.loads(path.read_text(encoding="utf-8"))
    modes = [name for name, value in raw.items() if name.startswith("pooling_mode_") and value]
    # one name in new versions, a flag for each mode in old ones
    mode = raw.get("pooling_mode") or " and ".join(modes)
    known = {"cls": "cls", "mean": "mean", "pooling_mode_cls_token": "cls"}
    known["pooling_mode_mean_tokens"] = "mean"
    if mode not in known:
        raise InputError(f"{path}: pooling must be one of {', '.join(POOLING)}, got {mode!r}")
    return known[mode]


def _kind(rows: Sequence[Group]) -> str:
    if isinstance(rows, Groups):
        return rows.kind
    return (
        "texts" if len(rows[0].texts) == 1 else "scored" if rows[0].score is not None else "pairs"
    )


def in_batch_loss(vectors: Tensor, cu_units: Tensor, scale: float, shaping: Shaping) -> Loss:
    """Each anchor's own positive against all other texts of the batch (Henderson et al. 2017).

    Args:
        vectors: [sequences, hidden_size] of length 1; of each unit the anchor, its positive, and
            any number of hard negatives.
        cu_units: [units + 1].
        scale: of cosines.
        shaping: label smoothing.
    """
    anchors = cu_units[:-1]
    is_anchor = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
    is_anchor = is_anchor.index_fill(0, anchors, True)
    scores = scale * vectors[anchors] @ vectors.T
    scores = scores.masked_fill(is_anchor, float("-inf"))
    positives = anchors + 1
    logs = scores.log_softmax(dim=-1)
    loss = F.nll_loss(logs, positives, reduction="sum")
    smooth = shaping.label_smoothing
    if smooth:
        # anchors are no candidates, and take no part in the smoothing either
        candidates = len(vectors) - len(anchors)
        spread = logs.masked_fill(is_anchor, 0.0).sum() / candidates
        loss = (1.0 - smooth) * loss - smooth * spread
    return Loss(loss, (scores.argmax(dim=-1) == positives).sum())


def nearest(queries: np.ndarray, documents: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """The documents of the greatest dot products, best first; equal ones in the given order."""
    out = []
    for query in queries:
        scores = documents @ query
        top = np.argsort(-scores, kind="stable")[:DEPTH]
        out.append([names[number] for number in top])
    return out
