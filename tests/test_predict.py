from __future__ import annotations

import io
import json
import os
import threading
from types import SimpleNamespace

import pytest
from tiny import stirred, tiny_config, tiny_tokenizer

from fastbert.errors import InputError
from fastbert.models import BertForSequenceClassification
from fastbert.tasks import predict as predict_module
from fastbert.tasks.classify import Classify
from fastbert.tasks.predict import predict
from fastbert.tasks.saved import Saved, save_task


def save(folder, *, pair: bool = False):
    config = tiny_config(vocab_size=tiny_tokenizer().vocab_size)
    model = stirred(BertForSequenceClassification.from_config(config))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    task = Classify()
    task.labels, task.pair, task.max_seq_len = list(config.labels), pair, 40
    save_task(task, folder)
    return model


def ask(model, monkeypatch, text: str | bytes) -> tuple[list[str], list[str]]:
    """Lines of the answer to standard input, and what was said."""
    raw = text.encode() if isinstance(text, str) else text
    stream = SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False)
    monkeypatch.setattr(predict_module.sys, "stdin", stream)
    out, said = io.StringIO(), []
    predict(model, out=out, say=said.append)
    return out.getvalue().split("\n"), said


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_every_line_has_its_answer_beside_it(tmp_path, monkeypatch, at_once) -> None:
    monkeypatch.setattr(predict_module, "LINES_AT_ONCE", at_once)
    save(tmp_path / "model")
    texts = ["river stone", "a\u2028winter\ttab", "", "café window", "  "]
    # the run's folder will do as well as the model's; the last line end may be missing
    lines, said = ask(tmp_path, monkeypatch, b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    assert lines.pop() == ""
    assert len(lines) == len(texts)
    for line, text in zip(lines, texts, strict=True):
        if not text.strip():
            assert line == ""
            continue
        [found] = Saved.from_pretrained(tmp_path).ask([text])
        label, probability, rest = line.split("\t", 2)
        assert (label, rest) == (found["label"], text)
        assert probability == f"{found['probability']:.4f}"
    assert said == ["2 blank lines: answered by blank lines"]


def test_files_are_read_in_turn(tmp_path, monkeypatch) -> None:
    save(tmp_path / "model")
    for name, text in (("a.txt", "river\n"), ("b.txt", "stone\n")):
        (tmp_path / name).write_text(text)
    out = io.StringIO()
    predict(tmp_path, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], out=out)
    assert [line.split("\t")[2] for line in out.getvalue().splitlines()] == ["river", "stone"]


def test_a_model_of_pairs_reads_two_texts_a_line(tmp_path, monkeypatch) -> None:
    save(tmp_path, pair=True)
    lines, _ = ask(tmp_path, monkeypatch, "river\tstone bridge\n\tonly\n")
    found = Saved.from_pretrained(tmp_path).ask([("river", "stone bridge"), ("", "only")])
    assert [line.split("\t")[0] for line in lines[:2]] == [answer["label"] for answer in found]
    assert lines[0].endswith("\triver\tstone bridge")


@pytest.mark.parametrize("bad", ["no tab", "one\ttwo\tthree"])
def test_a_line_that_is_no_pair(tmp_path, monkeypatch, bad) -> None:
    save(tmp_path, pair=True)
    with pytest.raises(InputError, match=r"standard input:2: .* trained on pairs"):
        ask(tmp_path, monkeypatch, f"a\tb\n{bad}\n")


def test_long_texts_are_cut_as_in_training_and_counted(tmp_path, monkeypatch) -> None:
    save(tmp_path)
    _, said = ask(tmp_path, monkeypatch, "river " * 50 + "\nstone\n")
    assert said == ["texts: 1 of 2 texts cut to 40 tokens"]


def test_undecodable_bytes_are_found(tmp_path, monkeypatch) -> None:
    save(tmp_path)
    with pytest.raises(InputError, match="standard input: line 2, byte 7: not UTF-8"):
        ask(tmp_path, monkeypatch, b"river\na\xff\n")


def test_no_text_is_an_error(tmp_path, monkeypatch) -> None:
    save(tmp_path)
    with pytest.raises(InputError, match="standard input: is empty"):
        ask(tmp_path, monkeypatch, b"")
    with pytest.raises(InputError, match=r"none.txt: no such file"):
        predict(tmp_path, [str(tmp_path / "none.txt")])
    with pytest.raises(InputError, match=r"a folder; a file with one text a line is wanted"):
        predict(tmp_path, [str(tmp_path)])
    monkeypatch.setattr(predict_module.sys, "stdin", None)
    with pytest.raises(InputError, match="standard input: is empty"):
        predict(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_read(tmp_path) -> None:
    save(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("river\nstone\n",), daemon=True)
    writer.start()
    out = io.StringIO()
    predict(tmp_path, [str(pipe)], out=out)
    writer.join()
    assert [line.split("\t")[2] for line in out.getvalue().splitlines()] == ["river", "stone"]


def test_weights_that_are_no_numbers(tmp_path, monkeypatch) -> None:
    model = save(tmp_path)
    model.classifier.dense.bias.data[1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model's weights are not finite"):
        ask(tmp_path, monkeypatch, "river\n")


def test_jsonl_in_is_answered_by_jsonl_with_all_its_fields(tmp_path) -> None:
    save(tmp_path / "model")
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"id": 7, "text": "river"}\n\n{"text": "stone"}\n')
    out, said = io.StringIO(), []
    predict(tmp_path, [str(asked)], out=out, say=said.append)
    first, blank, second, end = out.getvalue().split("\n")
    assert blank == end == ""
    answer = json.loads(first)
    assert answer["id"] == 7 and answer["text"] == "river"
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
    assert abs(sum(answer["probabilities"].values()) - 1) < 1e-5
    assert json.loads(second)["text"] == "stone"
    asked.write_text('{"text": "river"}\n{"words": 1}\n')
    with pytest.raises(InputError, match=r"asked.jsonl:2: no field 'text'; there are 'words'"):
        predict(tmp_path, [str(asked)], out=out)


def test_lines_of_text_may_be_answered_by_objects(tmp_path) -> None:
    save(tmp_path / "model")
    (tmp_path / "a.txt").write_text("river\n")
    out = io.StringIO()
    predict(tmp_path, [str(tmp_path / "a.txt")], as_json=True, out=out)
    assert json.loads(out.getvalue())["text"] == "river"


def test_a_bad_line_is_told_by_its_own_number(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(predict_module, "LINES_AT_ONCE", 2)
    save(tmp_path / "model")
    asked = tmp_path / "asked.jsonl"
    good = '{"text": "river"}\n'
    asked.write_text(f'\n{good}\n{good}{good}{{"words": 1}}\n')
    with pytest.raises(InputError, match=r"asked.jsonl:6: no field 'text'; there are 'words'"):
        predict(tmp_path, [str(asked)], out=io.StringIO())


def columns_of(folder, **columns) -> None:
    """Say in the model's folder which columns it was trained on."""
    path = folder / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **columns}))


def test_rows_like_those_of_the_training_file_are_understood(tmp_path) -> None:
    save(tmp_path / "one")
    columns_of(tmp_path / "one", text_column="review", pair_column="")
    one = Saved.from_pretrained(tmp_path / "one")
    [plain] = one.ask(["river stone"])
    # whatever else stands in the row
    rows = [{"review": "river stone", "text": "winter"}, {"review": "river stone", "second": "b"}]
    for answer in one.ask(rows):
        assert answer == plain
    assert one.ask([{"text": "river stone"}]) == [plain]
    save(tmp_path / "two", pair=True)
    columns_of(tmp_path / "two", text_column="question", pair_column="sentence")
    two = Saved.from_pretrained(tmp_path / "two")
    expected = two.ask([("river", "stone"), ("river", "")])
    rows = [{"sentence": "stone", "question": "river"}, {"question": "river", "sentence": None}]
    assert two.ask(rows) == expected
    assert two.ask([{"text": "river", "second": "stone"}]) == expected[:1]
    with pytest.raises(InputError, match="inputs:1: this model was trained on two texts a row"):
        two.ask([{"question": "river"}])
