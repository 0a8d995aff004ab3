from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer

from fastbert.errors import InputError
from fastbert.metrics.entities import entities
from fastbert.task_heads import TransitionScores
from fastbert.tasks.conll import Sentence, read_tagged, split_words
from fastbert.tasks.inference import Raw
from fastbert.tasks.tag import Tag
from fastbert.tasks.tagging import allowed_transitions, best_path, predicted_tags, word_units


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_two_columns_and_every_kind_of_blank_line(tmp_path, end, mark) -> None:
    lines = ["Ada\tB-PER", "met\tO", "  \t ", "Bob\tB-PER", "", "", "end\tO"]
    found = read_tagged(write(tmp_path / "a.conll", mark + end.join(lines)))
    assert found.sentences == [
        Sentence(("Ada", "met"), ("B-PER", "O"), 1),
        Sentence(("Bob",), ("B-PER",), 4),
        Sentence(("end",), ("O",), 7),
    ]


def test_four_columns_and_document_marks(tmp_path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n"
    found = read_tagged(write(tmp_path / "a.txt", text))
    assert found.sentences == [Sentence(("EU", "rejects"), ("I-ORG", "O"), 3)]
    assert "4 columns" in found.remarks and "1 document mark skipped" in found.remarks


def test_words_or_spans_in_jsonl(tmp_path) -> None:
    rows = [
        {"text": "Ada Lovelace, London", "entities": [{"start": 0, "end": 12, "label": "PER"}]},
        {"text": "in Londontown", "entities": [[3, 9, "LOC"]]},
        {"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]},
    ]
    found = read_tagged(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    first, second, third = found.sentences
    assert first.words == ("Ada", "Lovelace", ",", "London")
    assert first.tags == ("B-PER", "I-PER", "O", "O") and first.offsets[1] == (4, 12)
    assert second.tags == ("O", "B-LOC") and "1 entity that end inside a word" in found.remarks
    assert third == Sentence(("a", "b"), ("O", "B-X"), 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "a\tO\nb\n", r"a.conll:2: 1 column, expected 2"),
        ("a.conll", "a\tO\nb\tX\tO\n", r"a.conll:2: 3 columns, expected 2"),
        ("a.conll", "\n \n", r"a.conll: no sentence"),
        ("a.conll", b"a\tO\n\xff\tO\n", r"a.conll: byte 4: not UTF-8.*--encoding"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', r"a.jsonl:1: 1 word but 2 tags"),
        ("a.jsonl", '{"tokens": ["a"], "more": 1}', r"a.jsonl:1: no field of tags"),
        ("a.jsonl", '{"tokens": "a", "tags": ["O"]}', r"field 'tokens' must be a list of strings"),
        ("a.jsonl", '{"text": "abc", "entities": [[0, 9, "X"]]}', r"a.jsonl:1: a span must have"),
        (
            "a.jsonl",
            '{"text": "a b", "entities": [[0, 3, "X"], [2, 3, "Y"]]}',
            r"a.jsonl:1: the span 2 to 3 \(Y\) overlaps",
        ),
    ],
)
def test_bad_files_are_told_by_line(tmp_path, name, content, message) -> None:
    with pytest.raises(InputError, match=message):
        read_tagged(write(tmp_path / name, content))
    with pytest.raises(InputError, match="no such file"):
        read_tagged(tmp_path / "none.conll")


def test_words_of_a_text_keep_their_characters() -> None:
    text = "Ada's e-mail: 自然语言, 3.50 (a_b)!"
    words, offsets = split_words(text)
    assert words == ("Ada's", "e-mail", ":", *"自然语言", ",", "3.50", "(", "a_b", ")", "!")
    assert [text[start:end] for start, end in offsets] == list(words)
    assert "".join(words) == text.replace(" ", "")


def test_wide_spaces_are_words(tmp_path) -> None:
    path = write(tmp_path / "a.bmes", "高 B-X\n\u3000 O\n\u00a0  O \n\u3000\n勇 E-X\n")
    assert [s.words for s in read_tagged(path).sentences] == [("高", "\u3000", "\u00a0"), ("勇",)]


def test_one_scheme_is_read_as_what_it_begins(tmp_path) -> None:
    said: list[str] = []
    path = write(tmp_path / "a.conll", "a I-X\nb I-X\nc B-X\nd O\n")
    [row] = Tag().read(str(path), said.append)
    assert row.tags == ("B-X", "I-X", "B-X", "O")
    assert "tags in IOB1, read as IOB2 (guessed)" in said[0]


def long_sentence(words: int, seed: int = 0) -> Sentence:
    rng = np.random.default_rng(seed)
    chosen = rng.choice(["river", "harbour-thunder", "\u200b", "x"], words, p=[0.6, 0.2, 0.1, 0.1])
    return Sentence(
        tuple(chosen.tolist()), tuple(rng.choice(["O", "B-X", "I-X"], words).tolist()), 1
    )


def test_every_word_with_a_token_is_tagged_once_over_all_windows() -> None:
    sentences = [long_sentence(90), Sentence(("river",), ("O",), 2)]
    said: list[str] = []
    tags = ["O", "B-X", "I-X"]
    units = word_units(sentences, tags, tiny_tokenizer(), 20, 6, name="dev", say=said.append)
    silent = sentences[0].words.count("\u200b")
    assert said == [
        "dev: 1 of 2 sentences windowed",
        f"dev: {silent} of 91 words without a token, tagged O",
    ]
    numbers = [
        n
        for row, note in zip(units.rows, units.notes, strict=True)
        if row == 0
        for n in note.numbers
    ]
    expected = [n for n, word in enumerate(sentences[0].words) if word != "\u200b"]
    assert sorted(numbers) == expected and len(units.input_ids) > 5
    # the right tags as logits come back as the right tags
    logits = []
    for labels in units.token_labels:
        scores = np.zeros((len(labels), 3))
        for place, label in enumerate(labels):
            scores[place, max(label, 0)] = 1.0
        logits.append(scores)
    found = predicted_tags(sentences, units, logits, tags)
    for number in expected:
        assert found[0][number] == sentences[0].tags[number]


def test_context_decides_which_window_speaks_for_a_word() -> None:
    sentence = Sentence(tuple(["river"] * 30), tuple(["O"] * 30), 1)
    units = word_units([sentence], ["O", "B-X"], tiny_tokenizer(), 18, 8)
    for note, ids in zip(units.notes, units.input_ids, strict=True):
        inner = note.places[(note.numbers > 3) & (note.numbers < 26)]
        # four tokens of context on the nearer side, of the eight that windows share
        assert (np.minimum(inner - 1, len(ids) - 2 - inner) >= 3).all()


def all_paths(emissions: torch.Tensor, scores: torch.Tensor) -> dict[tuple[int, ...], float]:
    length, tags = emissions.shape
    paths: dict[tuple[int, ...], float] = {}
    for number in range(tags**length):
        path = tuple(number // tags**place % tags for place in range(length))
        total = scores[-2, path[0]] + scores[-1, path[-1]] + emissions[range(length), path].sum()
        total = total + sum(scores[a, b] for a, b in itertools.pairwise(path))
        paths[path] = float(total)
    return paths


def test_transition_scores_against_all_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = TransitionScores(3)
    lengths = torch.tensor([4, 1, 0, 3])
    with torch.no_grad():
        layer.transitions.copy_(torch.randn(5, 3, generator=generator))
    emissions = torch.randn(4, 4, 3, generator=generator).double()
    tags = torch.randint(3, (4, 4), generator=generator)
    expected = 0.0
    scores = layer.double().transitions.detach()
    for row, length in enumerate(lengths.tolist()):
        if length:
            paths = all_paths(emissions[row, :length], scores)
            total = np.logaddexp.reduce(list(paths.values()))
            expected += total - paths[tuple(tags[row, :length].tolist())]
            best = best_path(emissions[row, :length].numpy(), scores.numpy())
            assert tuple(best.tolist()) == max(paths, key=paths.__getitem__)
    found = layer(emissions, tags, lengths)
    assert abs(float(found) - expected) <= 64 * np.finfo(np.float64).eps * expected
    found.backward()
    assert layer.transitions.grad.abs().sum() > 0


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES", "BMES", "BILOU"])
def test_paths_under_a_scheme_are_well_formed(scheme) -> None:
    prefixes = {"IOB2": "BI", "IOBES": "BIES", "BMES": "BMES", "BILOU": "BILU"}[scheme]
    tags = ["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in "XY")]
    layer = TransitionScores(len(tags), allowed_transitions(tags, scheme))
    transitions = layer.transitions.detach().numpy()
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=(7, len(tags))).astype(np.float32)
        path = [tags[number] for number in best_path(scores, transitions)]
        marked = sum(tag != "O" for tag in path)
        assert sum(e.end - e.start for e in entities(path, scheme)) == marked
        # each entity by itself begins as its scheme says
        if scheme == "IOB2":
            assert all(path[e.start].startswith("B-") for e in entities(path, scheme))


@pytest.mark.parametrize(
    ("name", "sentences", "words", "scheme"),
    [
        ("ner/wnut17/wnut17train.conll", 3394, 62730, "IOB2"),
        ("ner/wnut17/emerging.test.annotated", 1287, 23394, "IOB2"),
        ("ner/resume/dev.char.bmes", 463, 13890, "BMES"),
    ],
)
def test_public_data_sets(data, name, sentences, words, scheme) -> None:
    if not (data / name).is_file():
        pytest.skip(f"the public data at {data} lack {name}")
    task = Tag()
    rows = task.read(str(data / name), lambda _: None)
    assert len(rows) == sentences and sum(len(row.words) for row in rows) == words
    assert task.scheme == scheme


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # accents on their own, as macOS writes them
        ("cafe\u0301 Dvor\u030ca\u0301k!", ("cafe\u0301", "Dvor\u030ca\u0301k", "!")),
        # vowel signs, a joiner, and a soft hyphen
        ("हिन्दी है", ("हिन्दी", "है")),
        ("\u0645\u06cc\u200c\u062e co\u00adop", ("\u0645\u06cc\u200c\u062e", "co\u00adop")),
        ("❤\ufe0f👩\u200d🚀 ok", ("❤", "\ufe0f", "👩", "\u200d", "🚀", "ok")),
        ("中\u0301文", ("中", "\u0301", "文")),
    ],
)
def test_marks_belong_to_the_letter_before_them(text, words) -> None:
    found, offsets = split_words(text)
    assert found == words
    assert [text[start:end] for start, end in offsets] == list(words)


def test_tags_are_answered_with_their_words() -> None:
    task = Tag()
    task.labels, task.max_seq_len = ["NOUN", "VERB"], 20
    rows = task.rows_of(["the river's stone", ["a", "b"]], ["x:1", "x:2"])
    units = task.build(rows, tiny_tokenizer())
    raw = Raw(tokens=[np.zeros((len(ids), 2), dtype=np.float32) for ids in units.input_ids])
    one, two = task.answers(rows, units, raw)
    assert one["text"] == "the river's stone" and one["words"] == ["the", "river's", "stone"]
    assert two["words"] == ["a", "b"] and "text" not in two
    assert [len(answer["tags"]) for answer in (one, two)] == [3, 2]
