"""Readers of single tasks: SQuAD, SemEval, SNIPS, choices, groups of texts, lists of passages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tokenizer

from fastbert.config import EncoderConfig
from fastbert.errors import InputError
from fastbert.tasks.answer import Answer, Window, best_span
from fastbert.tasks.choose import Choices, Choose, choices_of
from fastbert.tasks.conll import Sentence, read_tagged
from fastbert.tasks.embed import Embed, nearest
from fastbert.tasks.groups import Group, read_groups
from fastbert.tasks.inference import Raw
from fastbert.tasks.intent import Intent
from fastbert.tasks.records import FileFormat, read_records
from fastbert.tasks.registry import make_task
from fastbert.tasks.relation import Relation, with_markers
from fastbert.tasks.rerank import Rerank
from fastbert.tasks.semeval import Marked, read_marked, unmark
from fastbert.tasks.sequences import encode
from fastbert.tasks.similarity import Similarity
from fastbert.tasks.squad import Question, read_questions


def write(path: Path, content: str) -> Path:
    path.write_text(content, newline="")
    return path


def quiet(_: str) -> None:
    pass


def squad(*questions: dict) -> str:
    paragraphs = [{"context": "Ada met Bob.", "qas": list(questions)}]
    return json.dumps({"version": "2.0", "data": [{"title": "A", "paragraphs": paragraphs}]})


ADA = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}


def test_nested_and_flat_questions_are_the_same(tmp_path) -> None:
    none = {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}
    nested, _ = read_questions(write(tmp_path / "a.json", "\ufeff" + squad(ADA, none)))
    flat = [
        {**ADA, "context": "Ada met Bob.", "answers": {"text": ["Ada"], "answer_start": [0]}},
        {**none, "context": "Ada met Bob.", "answers": {"text": [], "answer_start": []}},
    ]
    lines, _ = read_questions(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, flat))))
    whole, _ = read_questions(write(tmp_path / "c.json", json.dumps(flat)))
    assert nested[0] == Question("1", "Who?", "Ada met Bob.", ("Ada",), (0,), 0, True)
    assert nested == whole == [row._replace(line=0) for row in lines]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON that can be read"),
        ("a.json", "{}", "no list of articles or questions"),
        ("a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "article 1: not as SQuAD has it"),
        (
            "a.json",
            squad({**ADA, "answers": [{"text": "Bob", "answer_start": 7}]}),
            r"question 1: the answer 'Bob' is not at character 7 of the context, where ' Bo' is",
        ),
        ("a.json", squad({**ADA, "answers": [{"text": "Ada"}]}), "needs a text and answer_start"),
        ("a.jsonl", '{"question": "Who?", "id": 1}', r"a.jsonl:1: no field 'context'"),
    ],
)
def test_bad_questions(tmp_path, name, content, message) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(write(tmp_path / name, content))


def fitted_answer(rows: list[Question], length: int = 24, **options) -> Answer:
    task = Answer(**options)
    task.fit(rows)
    task.max_seq_len = length
    return task


def test_windows_show_the_answer_or_point_at_their_first_token() -> None:
    context = "river " * 40 + "harbour thunder " + "stone " * 20
    row = Question("1", "winter?", context, ("harbour thunder",), (240,), 0, True)
    task = fitted_answer([row], stride=6, max_question_len=3)
    units = task.build([row], tiny_tokenizer())
    assert len(units.input_ids) > 4 and set(units.rows.tolist()) == {0}
    answers = set()
    for ids, place, note in zip(units.input_ids, units.places, units.notes, strict=True):
        assert len(ids) <= 24
        if place[0]:
            start, end = (note.offsets[side - note.first] for side in place)
            answers.add(context[start[0] : end[1]])
        else:
            assert place[1] == 0
    assert answers == {"harbour thunder"}
    # logits that mark these places give the answer back
    logits = [np.zeros((len(ids), 2), dtype=np.float32) for ids in units.input_ids]
    for scores, place in zip(logits, units.places, strict=True):
        scores[place[0], 0] = scores[place[1], 1] = 9.0
    [answer] = task.answers([row], units, Raw(tokens=logits))
    assert (answer["answer"], answer["start"]) == ("harbour thunder", 240)
    assert task.score([row], units, Raw(tokens=logits)).figures == {"exact_match": 1.0, "f1": 1.0}


def test_silence_is_an_answer_above_the_threshold() -> None:
    rows = [
        Question("1", "a?", "river stone", ("river",), (0,), 0, True),
        Question("2", "b?", "river stone", (), (), 0, True),
    ]
    task = fitted_answer(rows)
    units = task.build(rows, tiny_tokenizer())
    logits = [np.zeros((len(ids), 2), dtype=np.float32) for ids in units.input_ids]
    first = units.notes[0].first
    logits[0][first], logits[0][0] = 3.0, 2.0
    logits[1][first], logits[1][0] = 3.0, 2.5
    raw = Raw(tokens=logits)
    # both are answered: no answer scores less than the best one
    assert task.score(rows, units, raw).figures["no_answer_accuracy"] == 0.0
    task.tune(rows, units, raw)
    figures = task.score(rows, units, raw).figures
    assert figures["f1"] == figures["no_answer_accuracy"] == 1.0
    assert -2.0 <= task.null_threshold < -1.0
    assert task.facts()["null_threshold"] == task.null_threshold


@pytest.mark.parametrize("seed", range(10))
def test_the_best_span_is_the_best_of_all_in_order(seed) -> None:
    scores = np.random.default_rng(seed).normal(size=(14, 2))
    offsets = np.stack([np.arange(10), np.arange(10) + 1], axis=1)
    found = best_span(scores, Window(3, offsets), 4)
    every = {
        (start, end + 1): scores[3 + start, 0] + scores[3 + end, 1]
        for start in range(10)
        for end in range(start, min(start + 4, 10))
    }
    best = max(every, key=every.__getitem__)
    assert (found.start, found.end) == best and found.score == every[best]
    assert best_span(scores, Window(3, offsets[:0]), 4) is None


def test_squad_of_both_versions(data) -> None:
    folder = data / "qa"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    task = Answer()
    rows = task.read(str(folder / "squad_v1.1" / "train-v1.1.first12articles.json"), quiet)
    assert len(rows) == 4370 and all(row.answers for row in rows)
    rows = task.read(str(folder / "squad_v2.0" / "dev-v2.0.cs224n_half.json"), quiet)
    assert len(rows) == 6078 and sum(not row.answers for row in rows) == 3168


@pytest.mark.parametrize(
    ("sentence", "text", "first", "second"),
    [
        ("An <e1>old man</e1> by the <e2>sea</e2>.", "An old man by the sea.", "old man", "sea"),
        ("<e2>Sea</e2>, <e1>man</e1>", "Sea, man", "man", "Sea"),
        ("a<e1>b</e1>c <e2>d</e2>", "abc d", "b", "d"),
        (
            "The <e1> child </e1> in the <e2> cradle </e2> .",
            "The child in the cradle .",
            "child",
            "cradle",
        ),
        ("<e1> x </e1> <e2> y </e2>", "x y", "x", "y"),
    ],
)
def test_marks_are_taken_out(sentence, text, first, second) -> None:
    row = unmark(sentence, "here")
    assert row.text == text
    assert (text[slice(*row.first)], text[slice(*row.second)]) == (first, second)


@pytest.mark.parametrize(
    "sentence",
    ["<e1>a</e1> b", "<e1>a <e2>b</e2>", "</e1>a<e1> <e2>b</e2>", "<e1>a</e1> <e1>b</e1>"],
)
def test_marks_that_do_not_fit(sentence) -> None:
    with pytest.raises(InputError, match="here: expected one <e1>"):
        unmark(sentence, "here")


def test_relations_of_all_layouts(tmp_path) -> None:
    marked = "The <e1>river</e1> by the <e2>harbour</e2>."
    semeval = f'7\t"{marked}"\r\nNear(e1,e2)\r\nComment: none\r\n\r\n'
    fields = {"text": "The river by the harbour.", "head": [4, 9], "tail": {"start": 17, "end": 24}}
    for name, content in (
        ("a.txt", semeval),
        ("b.tsv", f"Near(e1,e2)\t{marked}\n"),
        ("c.jsonl", json.dumps({**fields, "relation": "Near(e1,e2)"})),
    ):
        [row], _ = read_marked(write(tmp_path / name, content))
        assert row == Marked(fields["text"], (4, 9), (17, 24), "Near(e1,e2)", 1)
    for name, content, message in (
        ("d.txt", "7\tno label", r"d.txt:1: expected a number, a tab and a sentence"),
        ("e.tsv", marked, r"e.tsv:1: no tab"),
        (
            "f.jsonl",
            json.dumps({**fields, "head": [9, 4], "label": "x"}),
            r"f.jsonl:1: field 'head'",
        ),
        ("g.jsonl", json.dumps(fields), r"g.jsonl:1: no relation"),
    ):
        with pytest.raises(InputError, match=message):
            read_marked(write(tmp_path / name, content))


@pytest.mark.parametrize("swapped", [False, True])
def test_markers_stand_around_both_entities(swapped) -> None:
    text = "The river stone harbour by the thunder"
    spans = [(4, 15), (31, 38)]
    row = Marked(text, *(spans[::-1] if swapped else spans))
    [encoded] = encode(tiny_tokenizer(), [text])
    tokens, places = with_markers(row, encoded.ids, encoded.offsets, tiny_tokenizer())
    unknown = tiny_tokenizer().unk_id
    assert len(tokens) == len(encoded.ids) + 4
    marked = np.flatnonzero(tokens == unknown)
    first, second = marked[:2], marked[2:]
    own = (second, first) if swapped else (first, second)
    assert places.tolist() == [own[0][0], own[1][0]]
    inside = tiny_tokenizer().encode("river stone")
    start = own[1 if swapped else 0][0] + 1
    assert tokens[start : start + len(inside)].tolist() == inside


def test_entities_side_by_side_keep_their_markers_apart() -> None:
    [encoded] = encode(tiny_tokenizer(), ["river stone"])
    row = Marked("river stone", (0, 5), (6, 11))
    tokens, places = with_markers(row, encoded.ids, encoded.offsets, tiny_tokenizer())
    marked = np.flatnonzero(tokens == tiny_tokenizer().unk_id)
    assert places.tolist() == [marked[0], marked[2]] and marked[2] == marked[1] + 1


def test_a_long_sentence_is_cut_around_its_entities() -> None:
    text = "stone " * 30 + "river " + "harbour " + "stone " * 30
    rows = [Marked(text, (180, 185), (186, 193), "a", 1), Marked("river x", (0, 5), (6, 7), "b", 2)]
    task = Relation()
    task.fit(rows)
    task.max_seq_len = 20
    said: list[str] = []
    units = task.build(rows, tiny_tokenizer(), name="dev", say=said.append)
    assert said == ["dev: 1 of 2 sentences cut around its entities to 20 tokens"]
    for ids, places in zip(units.input_ids, units.places, strict=True):
        assert len(ids) <= 20 and (ids[places] == tiny_tokenizer().unk_id).all()


def test_semeval_2010_task_8(data) -> None:
    folder = data / "relation" / "semeval2010_task8"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    task = Relation()
    rows = task.read(str(folder / "TRAIN_FILE.TXT"), quiet)
    task.fit(rows)
    assert len(rows) == 8000 and len(task.labels) == 19
    assert len(task.read(str(folder / "TEST_FILE_FULL.TXT"), quiet)) == 2717
    tsv = task.read(str(folder / "rbert_test.tsv"), quiet)
    assert len(tsv) == 2717 and tsv[0].text.count("<") == 0
    assert rows[0].text[slice(*rows[0].first)] == "configuration"


def test_snips_in_three_files(data, tmp_path) -> None:
    folder = data / "slots" / "snips"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    task = Intent()
    rows = task.read(str(folder / "train"), quiet)
    task.fit(rows)
    assert (len(rows), len(task.labels), len(task.slots)) == (13084, 7, 72)


def test_three_files_that_do_not_fit(tmp_path) -> None:
    for name, text in (("seq.in", "a b\nc\n"), ("seq.out", "O O\nO O\n"), ("label", "X\nY\n")):
        write(tmp_path / name, text)
    with pytest.raises(InputError, match=r"seq.out:2: 2 tags for 1 word"):
        Intent().read(str(tmp_path), quiet)
    write(tmp_path / "label", "X\n")
    with pytest.raises(InputError, match=r"seq\.in 2, seq\.out 2, label 1"):
        Intent().read(str(tmp_path), quiet)
    (tmp_path / "label").unlink()
    with pytest.raises(InputError, match="no file label"):
        Intent().read(str(tmp_path), quiet)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"question": "q", "choices": ["a", "b"], "label": 1}, Choices("q", ("a", "b"), 1)),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, Choices("q", ("x", "y"), 1)),
        ({"question": "q", "choices": ["x", "y"], "label": "y"}, Choices("q", ("x", "y"), 1)),
        ({"sent1": "q", "ending0": "x", "ending1": "y", "label": "0"}, Choices("q", ("x", "y"), 0)),
        ({"premise": "q", "choice1": "x", "choice2": "y"}, Choices("q", ("x", "y"))),
        (
            {"premise": "p", "question": "cause", "choice1": "x", "choice2": "y"},
            Choices("p cause", ("x", "y")),
        ),
        (
            {"sent1": "a", "sent2": "b", "ending0": "x", "ending1": "y"},
            Choices("a b", ("x", "y")),
        ),
        ({"question": "q", "context": "c", "options": ["x", "y"]}, Choices("c q", ("x", "y"))),
    ],
)
def test_choices_of_many_layouts(fields, expected) -> None:
    assert choices_of(fields, "here") == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "q", "choices": ["a"]}, "at least 2 choices"),
        ({"choices": ["a", "b"]}, "no question"),
        ({"question": "q", "choices": ["a", "b"], "label": 2}, "label 2 names none of the 2"),
        ({"question": "q", "choices": ["a", "b"], "label": -1}, "names none"),
        ({"question": "q", "choices": ["a", "b"], "label": True}, "names none"),
    ],
)
def test_choices_that_do_not_fit(fields, message) -> None:
    with pytest.raises(InputError, match=f"here: .*{message}"):
        choices_of(fields, "here")


def test_labels_may_count_from_one(tmp_path) -> None:
    path = write(tmp_path / "a.csv", "premise,choice1,choice2,label\nq,x,y,2\n")
    [row] = Choose(first_label=1).read(str(path), quiet)
    assert row.label == 1


def test_groups_of_many_layouts(tmp_path) -> None:
    form = FileFormat()
    found = read_groups(write(tmp_path / "a.tsv", "sentence1\tsentence2\tscore\na\tb\t2.5\n"), form)
    assert (found.kind, list(found)) == ("scored", [Group(("a", "b"), 2.5, 2)])
    rows = {"query": "q", "positive": "p", "negatives": ["n", "m"]}
    found = read_groups(write(tmp_path / "b.jsonl", json.dumps(rows)), form)
    assert (found.kind, list(found)) == ("pairs", [Group(("q", "p", "n", "m"), None, 1)])
    found = read_groups(write(tmp_path / "c.txt", "one\n\ntwo\n"), form)
    assert found.kind == "texts" and [group.texts for group in found] == [("one",), ("two",)]
    plain = write(tmp_path / "c.jsonl", '{"id": 7, "text": "one"}\n\n{"text": "two"}\n')
    assert read_groups(plain, form).kind == "texts"
    assert [group.texts for group in read_groups(plain, form)] == [("one",), ("two",)]
    with pytest.raises(InputError, match=r"f.jsonl:2: no field 'text'; there are 'sentence'"):
        read_groups(write(tmp_path / "f.jsonl", '{"text": "a"}\n{"sentence": "b"}\n'), form)
    with pytest.raises(InputError, match="cannot tell which columns hold the texts"):
        read_groups(write(tmp_path / "d.tsv", "x\ty\n1\t2\n"), form)
    with pytest.raises(InputError, match=r"e.tsv:2: field 'score' must be a number, got 'high'"):
        read_groups(write(tmp_path / "e.tsv", "sentence1\tsentence2\tscore\na\tb\thigh\n"), form)


def collection(folder: Path) -> Path:
    folder.mkdir()
    write(folder / "queries.jsonl", '{"_id": "q", "text": "river"}\n')
    documents = [{"_id": "a", "title": "t", "text": "stone"}, {"_id": "b", "text": "harbour"}]
    write(folder / "corpus.jsonl", "\n".join(map(json.dumps, documents)))
    write(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\nq\tb\t2\nq\ta\t0\n")
    return folder


def test_a_collection_is_scored_by_its_judgements(tmp_path) -> None:
    folder = collection(tmp_path / "c")
    task = Embed()
    rows = task.read(str(folder), quiet)
    assert (rows.kind, rows.queries, len(rows)) == ("collection", 1, 3)
    assert rows[1].texts == ("t stone",) and rows.gains == {"q": {"b": 2.0, "a": 0.0}}
    task.max_seq_len = 20
    units = task.build(rows, tiny_tokenizer())
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype=np.float32)
    assert task.score(rows, units, Raw(sequences=vectors)).figures["mrr_at_10"] == 1.0
    vectors[2] = [-1, 0]
    assert task.score(rows, units, Raw(sequences=vectors)).figures["mrr_at_10"] == 0.5
    with pytest.raises(InputError, match="a collection is to score on"):
        task.fit(rows)
    write(folder / "qrels.tsv", "q\ta\t1\nq\tz\t1\np\ta\t1\n")
    remarks = task.read(str(folder), quiet).remarks
    assert remarks.endswith("3 judgements, 2 of them of a query or document that is not there")
    write(folder / "qrels.tsv", "q\ta\t0\n")
    with pytest.raises(InputError, match="no query has a relevant document"):
        task.read(str(folder), quiet)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_collection_with_an_id_twice(tmp_path, name) -> None:
    folder = collection(tmp_path / "c")
    path = folder / name
    again = path.read_text().splitlines()[0]
    write(path, f"{path.read_text().rstrip()}\n\n{again}\n")
    # found twice, a document would be scored twice
    with pytest.raises(InputError, match=rf"{name}:\d: the id '[qa]' was there before"):
        Embed().read(str(folder), quiet)


def test_the_nearest_come_first() -> None:
    documents = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    assert nearest(np.array([[1.0, 0.1]]), documents, ["a", "b", "c"]) == [["a", "c", "b"]]


def test_passages_in_rows_and_in_lists(tmp_path) -> None:
    tsv = write(tmp_path / "a.tsv", "query\tpassage\tlabel\nq\tp\t1\nq\tn\t0\n")
    lists = write(tmp_path / "b.jsonl", json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}))
    both = write(
        tmp_path / "c.jsonl", json.dumps({"query": "q", "passages": ["p", "n"], "labels": [1, 0]})
    )
    for path in (tsv, lists, both):
        rows = Rerank().read(str(path), quiet)
        assert [(row.text, row.second, row.label) for row in rows] == [
            ("q", "p", "1"),
            ("q", "n", "0"),
        ]
    with pytest.raises(InputError, match="no passage is relevant"):
        Rerank().check(rows[1:])
    with pytest.raises(InputError, match="every passage is relevant"):
        Rerank().fit(rows[:1])
    for label in ("yes", "nan", "inf"):
        path = write(tmp_path / "d.tsv", f"query\tpassage\tlabel\nq\tp\t{label}\n")
        with pytest.raises(InputError, match=rf"the label must be a number, .* got '{label}'"):
            Rerank().read(str(path), quiet)
    path = write(tmp_path / "e.tsv", "query\tpassage\tgrade\tlabel\nq\tp\t2\tno\n")
    [row] = Rerank(label_column="grade").read(str(path), quiet)
    assert row.label == "2"


def test_scores_that_are_none(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\td\tnan\n")
    with pytest.raises(InputError, match=r"a.tsv:3: field 'score' must be a number, got 'nan'"):
        Similarity().read(str(path), quiet)
    path = write(tmp_path / "b.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\td\t1\n")
    task = Similarity()
    with pytest.raises(InputError, match="every score is 1"):
        task.fit(task.read(str(path), quiet))


def test_sts_benchmark_is_read_whole(data) -> None:
    folder = data / "pairs" / "stsb"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    assert len(Similarity().read(str(folder / "train.tsv"), quiet)) == 5749
    names = "genre,file,year,id,score,sentence1,sentence2"
    assert len(Similarity(columns=names).read(str(folder / "sts-test.tsv"), quiet)) == 1379


@pytest.mark.parametrize(
    "given",
    [
        {"text": "Ada", "answer_start": 0},
        {"text": None, "answer_start": None},
        ["Ada"],
        "Ada",
        3,
    ],
)
def test_answers_in_another_form_are_no_silence(tmp_path, given) -> None:
    row = {"question": "Who?", "context": "Ada met Bob.", "answers": given}
    path = write(tmp_path / "a.jsonl", json.dumps({**ADA, **row, "answers": []}) + "\n")
    assert read_questions(path)[0][0].answers == ()
    write(path, "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"a.jsonl:2: answers must be a list of dictionaries"):
        read_questions(path)


def test_questions_to_train_on_have_answers(tmp_path) -> None:
    rows = [{"question": "Who?", "context": "Ada met Bob.", **more} for more in (ADA, {})]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    found, _ = read_questions(path)
    with pytest.raises(InputError, match="here:2: no field 'answers'"):
        Answer().fit(found, "here")


def test_a_context_without_a_token_is_answered_in_json() -> None:
    task = Answer()
    task.may_be_unanswered, task.max_seq_len = True, 20
    rows = task.rows_of([("river?", ""), ("river?", "the stone")], ["f:3", "f:4"])
    units = task.build(rows, tiny_tokenizer())
    raw = Raw(tokens=[np.zeros((len(ids), 2), dtype=np.float32) for ids in units.input_ids])
    silent, found = task.answers(rows, units, raw)
    assert json.loads(json.dumps([silent, found], allow_nan=False))[0]["answer"] == ""
    assert (silent["id"], found["id"]) == ("3", "4") and found["no_answer_margin"] == 0.0


def test_intents_that_training_has_not_seen_are_missed() -> None:
    task = Intent()
    task.fit(
        [Sentence(("river",), (tag,), intent=name) for tag, name in (("B-x", "A"), ("O", "B"))]
    )
    rows = [Sentence(("river",), ("O",), intent="C")]
    task.max_seq_len = 20
    units = task.build(rows, tiny_tokenizer())
    [ids] = units.input_ids
    tokens = [np.zeros((len(ids), 2), dtype=np.float32)]
    scores = task.score(rows, units, Raw(np.zeros((1, 2), dtype=np.float32), tokens))
    assert scores.figures["intent_accuracy"] == scores.figures["exact"] == 0.0
    assert scores.confusion is None


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("klingon", "--encoding: Python knows no encoding 'klingon'"),
        ("base64", "--encoding: Python knows no encoding 'base64'"),
        ("utf-16", "--encoding utf-16: is read only where ASCII stays ASCII"),
        ("cp037", "--encoding cp037: is read only where ASCII stays ASCII"),
    ],
)
def test_encodings_that_cannot_be_read(tmp_path, encoding, message) -> None:
    for name, read in (
        ("a.conll", lambda path: read_tagged(path, encoding)),
        ("a.json", lambda path: read_questions(path, encoding)),
        ("a.txt", lambda path: read_marked(path, encoding)),
        ("a.tsv", lambda path: read_records(path, FileFormat(encoding))),
    ):
        with pytest.raises(InputError, match=message):
            read(write(tmp_path / name, "a\tb\n"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "big5", "shift_jis"])
def test_encodings_that_keep_ascii(tmp_path, encoding) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("text\tlabel\n日本 a\tx\n".encode(encoding))
    [record] = read_records(path, FileFormat(encoding)).rows
    assert record.fields == {"text": "日本 a", "label": "x"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("choose", {"first_label": 1}),
        ("classify", {"columns": "label,text", "quoting": "none"}),
        ("similarity", {"columns": "text_a,text_b,score", "quoting": "csv"}),
        ("rerank", {"columns": "a,b,c", "label_column": "c", "manner": "passages"}),
    ],
)
def test_other_files_are_read_as_the_training_file(name, options) -> None:
    facts = json.loads(json.dumps(make_task(name, **options).facts()))
    again = make_task(name)
    again.restore(facts, EncoderConfig(labels=["score"]), "task.json")
    assert {field: getattr(again, field) for field in options} == options
    if name != "choose":
        with pytest.raises(InputError, match=r"task.json: columns must be text, got 3"):
            again.restore({**facts, "columns": 3}, EncoderConfig(labels=["score"]), "task.json")
