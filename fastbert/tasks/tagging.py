"""What tasks that tag words share: first sub-words, windows over long sentences, best tag paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbert.metrics.entities import OUTSIDE, Entity, entities, split_tag
from fastbert.packing import IGNORE_INDEX
from fastbert.tasks.conll import Sentence
from fastbert.tasks.losses import Loss, Shaping, class_loss
from fastbert.tasks.sequences import encode_words, join, room, say_share, windows
from fastbert.tasks.task import Say
from fastbert.tasks.units import TaskBatch, Units
from fastbert.tokenizer import Tokenizer


class Words(NamedTuple):
    """Which words a sequence speaks for.

    Attributes:
        numbers: of the words in their sentence.
        places: of each one's first sub-word in the sequence.
    """

    numbers: np.ndarray
    places: np.ndarray


def word_units(
    sentences: Sequence[Sentence],
    tags: Sequence[str],
    tokenizer: Tokenizer,
    max_seq_len: int,
    stride: int,
    *,
    name: str = "",
    say: Say | None = None,
) -> Units:
    """One sequence a sentence, windows where it is too long; a unit each.

    A word is tagged at its first sub-word, in the window where most is seen on both sides of it.

    Args:
        sentences: with tags for targets.
        tags: the tag set.
        tokenizer: the model's.
        max_seq_len: tokens a sequence.
        stride: tokens that neighbouring windows share.
        name: of the sentences, for what is said.
        say: told how many sentences were windowed, and words that have no token.
    """
    index = {tag: number for number, tag in enumerate(tags)}
    size = room(tokenizer, False, max_seq_len)
    ids, types, rows, notes, labels = [], [], [], [], []
    long = silent = 0
    for row, (tokens, words) in enumerate(encode_words(tokenizer, [s.words for s in sentences])):
        sentence = sentences[row]
        is_first = np.diff(words, prepend=-1) > 0
        silent += len(sentence.words) - int(is_first.sum())
        stretches = windows(len(tokens), size, min(stride, size - 1))
        long += len(stretches) > 1
        places = np.arange(len(tokens))
        context = [np.minimum(places - start, end - 1 - places) for start, end in stretches]
        owner = np.argmax(context, axis=0) if len(tokens) else places
        for number, (start, end) in enumerate(stretches):
            joined = join(tokenizer, tokens[start:end])
            own = np.flatnonzero(is_first & (owner == number))
            note = Words(words[own], own - start + joined.first)
            targets = np.full(len(joined.input_ids), IGNORE_INDEX, dtype=np.int64)
            if sentence.tags is not None:
                known = [index.get(sentence.tags[n], IGNORE_INDEX) for n in note.numbers]
                targets[note.places] = np.array(known, dtype=np.int64)
            ids.append(joined.input_ids)
            types.append(joined.token_type_ids)
            rows.append(row)
            notes.append(note)
            labels.append(targets)
    say_share(say, name, long, len(sentences), "sentence", "windowed")
    total = sum(len(sentence.words) for sentence in sentences)
    say_share(say, name, silent, total, "word", "without a token, tagged O")
    return Units(ids, types, rows=np.array(rows, dtype=np.int64), token_labels=labels, notes=notes)


def tag_loss(logits: Tensor, batch: TaskBatch, shaping: Shaping) -> Loss:
    """Cross-entropy over labelled tokens."""
    assert batch.token_labels is not None
    return class_loss(logits, batch.token_labels, shaping)


def path_loss(logits: Tensor, batch: TaskBatch, transitions: Any) -> Loss:
    """Negative log-likelihood of whole tag sequences under transition scores."""
    labels = batch.token_labels
    assert labels is not None
    rows = torch.arange(len(labels), device=labels.device)
    owner = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), rows.int(), right=True)
    owner = owner.clamp(max=len(batch.cu_seqlens) - 2)
    labelled = labels != IGNORE_INDEX
    before = labelled.long().cumsum(0) - labelled.long()
    first = batch.cu_seqlens[:-1].long().clamp(max=len(labels) - 1)
    place = before - before[first][owner]
    sequences, longest = len(first), batch.max_seqlen
    # the tail and tokens without a target go to a place of their own
    flat = torch.where(labelled, owner * longest + place, sequences * longest)
    emissions = logits.new_zeros(sequences * longest + 1, logits.shape[1]).index_copy(
        0, flat, logits
    )
    tags = labels.new_zeros(sequences * longest + 1).index_copy(0, flat, labels.clamp(min=0))
    lengths = labels.new_zeros(sequences).index_add(0, owner, labelled.long())
    loss = transitions(
        emissions[:-1].view(sequences, longest, -1), tags[:-1].view(sequences, longest), lengths
    )
    return Loss(loss, ((logits.argmax(dim=-1) == labels) & labelled).sum())


def best_path(scores: np.ndarray, transitions: np.ndarray | None) -> np.ndarray:
    """The likeliest tags of one sequence (Viterbi 1967).

    Args:
        scores: [words, tags].
        transitions: [tags + 2, tags], as in TransitionScores; None for each word by itself.
    """
    if transitions is None or not len(scores):
        return scores.argmax(axis=-1)
    inner, start, end = transitions[:-2], transitions[-2], transitions[-1]
    best = start + scores[0]
    back = np.zeros(scores.shape, dtype=np.int64)
    for place in range(1, len(scores)):
        through = best[:, None] + inner
        back[place] = through.argmax(axis=0)
        best = through.max(axis=0) + scores[place]
    path = [int((best + end).argmax())]
    for place in range(len(scores) - 1, 0, -1):
        path.append(int(back[place][path[-1]]))
    return np.array(path[::-1])


def predicted_tags(
    sentences: Sequence[Sentence],
    units: Units,
    logits: Sequence[np.ndarray],
    tags: Sequence[str],
    transitions: np.ndarray | None = None,
) -> list[list[str]]:
    """A tag for every word of every sentence; O for words without a token."""
    out = [[OUTSIDE] * len(sentence.words) for sentence in sentences]
    assert units.rows is not None
    for row, note, scores in zip(units.rows.tolist(), units.notes, logits, strict=True):
        path = best_path(scores[note.places], transitions)
        for word, tag in zip(note.numbers.tolist(), path.tolist(), strict=True):
            out[row][word] = tags[tag]
    return out


def entity_answers(
    sentence: Sentence, tags: Sequence[str], scheme: str | None
) -> list[dict[str, Any]]:
    """Entities with their words, and with their characters where the sentence came as text."""
    found = []
    for entity in entities(tags, scheme):
        answer: dict[str, Any] = {"label": entity.kind}
        if sentence.text is not None:
            start, end = sentence.offsets[entity.start][0], sentence.offsets[entity.end - 1][1]
            answer |= {"start": start, "end": end, "text": sentence.text[start:end]}
        else:
            answer["text"] = " ".join(sentence.words[entity.start : entity.end])
        found.append({**answer, "start_word": entity.start, "end_word": entity.end})
    return found


def allowed_transitions(tags: Sequence[str], scheme: str | None) -> Tensor:
    """[tags + 2, tags] bool: what may follow what; the last two rows are start and end."""
    allowed = torch.ones(len(tags) + 2, len(tags), dtype=torch.bool)
    if scheme is None or scheme == "IOB1":
        return allowed
    goes_on = {"I", "M", "E", "L"}
    closes = scheme in ("IOBES", "BILOU", "BMES")
    for after, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        for before, other in enumerate(tags):
            other_prefix, other_kind = split_tag(other)
            is_open = other_prefix in (("B", "I", "M") if closes else ("B", "I"))
            follows = is_open and other_kind == kind
            if prefix in goes_on:
                allowed[before, after] = follows
            elif closes and is_open:
                allowed[before, after] = False
        allowed[-2, after] = prefix not in goes_on
        allowed[-1, after] = not (closes and prefix in ("B", "I", "M"))
    return allowed


def entities_of(sentences: Sequence[Sentence], scheme: str | None) -> list[list[Entity]]:
    """The entities that sentences' own tags mark."""
    return [entities(sentence.tags or (), scheme) for sentence in sentences]
