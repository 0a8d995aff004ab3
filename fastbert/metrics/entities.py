"""Entities in tag sequences: what the schemes mean, and strict scores of whole entities.

An entity counts as found where first word, last word and type are right (Tjong Kim Sang and
De Meulder 2003, the CoNLL-2003 task). A tag is a prefix, "-", and the type:

    IOB1   I inside; B only where an entity follows another of its type at once
    IOB2   B begins, I goes on ("BIO")
    IOBES  B begins, I goes on, E ends, S stands alone ("BIOES", "BILOU" with L and U)
    BMES   B begins, M goes on, E ends, S stands alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastbert.errors import InputError
from fastbert.metrics.classification import ClassScore, f1

OUTSIDE = "O"
SCHEMES = ("IOB1", "IOB2", "IOBES", "BILOU", "BMES")
_PREFIXES = {
    "IOB1": "IB",
    "IOB2": "BI",
    "IOBES": "BIES",
    "BILOU": "BILU",
    "BMES": "BMES",
}
# what a prefix means: begins an entity, goes on, ends it, is one by itself
_MEANING = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


class Entity(NamedTuple):
    """Words `start` to `end`, the latter not included."""

    kind: str
    start: int
    end: int


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type; "" as prefix where the tag has none."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and prefix in _MEANING else ("", tag)


def guess_scheme(sentences: Iterable[Sequence[str]]) -> str | None:
    """The scheme that tag sequences are in; None where tags have no prefixes.

    Raises:
        InputError: prefixes that belong to no scheme together.
    """
    prefixes: set[str] = set()
    first_inside = begins = False
    for tags in sentences:
        before = OUTSIDE
        for tag in tags:
            prefix, kind = split_tag(tag)
            prefixes.add(prefix)
            begins |= prefix == "B" and split_tag(before)[1] != kind
            first_inside |= prefix == "I" and split_tag(before)[1] != kind
            before = tag
    prefixes.discard(OUTSIDE)
    if "" in prefixes:
        return None
    if prefixes <= set("BI"):
        # an I that no B opens is IOB1, unless a B stands where IOB1 would not have one
        return "IOB1" if first_inside and not begins else "IOB2"
    for scheme in ("BMES", "IOBES", "BILOU"):
        if prefixes <= set(_PREFIXES[scheme]):
            return scheme
    raise InputError(
        f"tags with the prefixes {', '.join(sorted(prefixes))} together are of none of "
        f"{', '.join(SCHEMES)}"
    )


def entities(tags: Sequence[str], scheme: str | None = "IOB2") -> list[Entity]:
    """The well-formed entities of one sentence, in order.

    A tag that does not go on where its scheme says it must opens an entity of its own in IOB1 and
    IOB2 (as conlleval has it); in the schemes that mark ends an entity without one is none.

    Args:
        tags: one a word.
        scheme: of `SCHEMES`; None for bare types, where neighbours of one type are one entity.
    """
    if scheme is None or scheme in ("IOB1", "IOB2"):
        return _open_ended(tags)
    return _closed(tags)


def _open_ended(tags: Sequence[str]) -> list[Entity]:
    found: list[Entity] = []
    start, open_kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        if open_kind and (prefix in (OUTSIDE, "B") or kind != open_kind):
            found.append(Entity(open_kind, start, place))
            open_kind = ""
        if prefix != OUTSIDE and not open_kind:
            start, open_kind = place, kind
    return found


def _closed(tags: Sequence[str]) -> list[Entity]:
    found: list[Entity] = []
    start, open_kind = 0, ""
    for place, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        meaning = _MEANING.get(prefix, OUTSIDE)
        if meaning == "S":
            found.append(Entity(kind, place, place + 1))
            open_kind = ""
        elif meaning == "B":
            start, open_kind = place, kind
        elif meaning == OUTSIDE or kind != open_kind:
            open_kind = ""
        elif meaning == "E":
            found.append(Entity(kind, start, place + 1))
            open_kind = ""
    return found


def entity_scores(
    predicted: Sequence[Sequence[Entity]], there: Sequence[Sequence[Entity]]
) -> tuple[dict[str, float], list[ClassScore]]:
    """Strict precision, recall and F1 over all entities, and a table by type.

    Args:
        predicted, there: entities of each sentence.
    """
    hits, said, true = Counter[str](), Counter[str](), Counter[str]()
    for ours, theirs in zip(predicted, there, strict=True):
        said.update(entity.kind for entity in ours)
        true.update(entity.kind for entity in theirs)
        hits.update(entity.kind for entity in set(ours) & set(theirs))
    precision, recall, score = f1(hits.total(), said.total(), true.total())
    table = [
        ClassScore(kind, *f1(hits[kind], said[kind], true[kind]), true[kind])
        for kind in sorted(said.keys() | true.keys())
    ]
    return {"precision": precision, "recall": recall, "f1": score}, table
