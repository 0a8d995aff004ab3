from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from fastbert.data.corpus import Document, read_documents
from fastbert.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FASTBERT_DATA", ROOT.parent / "shared" / "data")) / "pretrain"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is missing")

PROSE = (
    "It was the best of times, it was the worst of times, it was the age\r\n"
    "of wisdom, it was the age of foolishness, it was the epoch of belief,\r\n"
    "it was the epoch of incredulity.\r\n"
    "\r\n"
    "There were a king with a large jaw and a queen with a plain face, on\r\n"
    "the throne of England; there were a king with a large jaw and a queen\r\n"
    "with a fair face, on the throne of France.\r\n"
)


def read(*paths: Path | str, doc_sep: str = "auto") -> tuple[list[Document], list[str]]:
    said: list[str] = []
    documents = list(
        read_documents([str(path) for path in paths], doc_sep=doc_sep, say=said.append)
    )
    return documents, said


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_wrapped_prose_is_one_document_of_joined_paragraphs(tmp_path: Path) -> None:
    file = write(tmp_path / "book.txt", b"\xef\xbb\xbf" + PROSE.encode())
    documents, said = read(file)
    assert len(documents) == 1
    first, second = documents[0].text.split("\n")
    assert first.startswith("It was the best") and "the age of wisdom" in first
    assert second.endswith("throne of France.") and "\r" not in documents[0].text
    assert said[0] == (
        f"{file}: one document a file (guessed; --doc-sep blank|line|file to change)"
    )
    assert said[-1] == "corpus: 1 file, 1 document"


def test_blank_on_wrapped_prose_joins_each_block(tmp_path: Path) -> None:
    documents, said = read(write(tmp_path / "book.txt", PROSE), doc_sep="blank")
    assert [document.line for document in documents] == [1, 5]
    assert not any("\n" in document.text for document in documents)
    assert said == ["corpus: 1 file, 2 documents"]


def test_blocks_of_sentences_are_documents(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "One sentence.\nTwo.\n \n\nThird one.\nFourth.\n")
    documents, said = read(file)
    assert [document.text for document in documents] == [
        "One sentence.\nTwo.",
        "Third one.\nFourth.",
    ]
    assert "documents separated by blank lines (guessed" in said[0]


def test_lines_without_blanks_are_documents(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "A first text. Of two.\nThe second\u2028goes on.")
    documents, said = read(file)
    assert [document.text for document in documents] == [
        "A first text. Of two.",
        "The second\u2028goes on.",
    ]
    assert "one document a line (guessed" in said[0]


def test_doc_sep_is_obeyed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "One.\nTwo.\n\nThree.\n")
    assert len(read(file, doc_sep="line")[0]) == 3
    assert len(read(file, doc_sep="blank")[0]) == 2
    assert [document.text for document in read(file, doc_sep="file")[0]] == ["One.\nTwo.\nThree."]
    with pytest.raises(InputError, match="doc-sep: 'page' is not one of auto, blank, line, file"):
        read_documents([file], doc_sep="page")


def test_wrapped_chinese_is_joined_without_spaces(tmp_path: Path) -> None:
    line = "\u5b66" * 36
    file = write(
        tmp_path / "a.txt", f"{line}\n{line}\n{line}\n{line}\u3002\n\n{line}\n{line}\u3002\n"
    )
    documents, _ = read(file)
    assert documents[0].text == f"{line * 4}\u3002\n{line * 2}\u3002"


def test_gutenberg_licence_is_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "book.txt",
        "The Project Gutenberg EBook of X\r\n\r\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK X,\r\nWITH A LONG TITLE ***\r\n\r\n"
        + PROSE
        + "\r\nEnd of Project Gutenberg's X\r\n\r\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\nlicence\r\n",
    )
    documents, said = read(file)
    assert documents[0].text.startswith("It was the best")
    assert documents[0].text.endswith("throne of France.")
    assert said[-1].endswith("Project Gutenberg header and licence left out of 1 file")


def test_doc_blocks(tmp_path: Path) -> None:
    file = write(
        tmp_path / "wiki_00",
        '<doc id="1" url="u" title="A &amp; B">\nA & B\n\nText of it.\nMore.\n\n</doc>\n'
        '<doc id="2" url="u" title="Stub">\nStub\n\n\n</doc>\n'
        '<doc id="3" url="u" title="C">\nC\n\nUnclosed text.\n',
    )
    documents, said = read(tmp_path)
    assert [document.text for document in documents] == [
        "A & B\nText of it.\nMore.",
        "C\nUnclosed text.",
    ]
    assert [document.line for document in documents] == [1, 13]
    assert str(file) in said[0] and "one document a <doc> block" in said[0]
    assert said[-1] == "corpus: 1 file, 2 documents; 1 document without text skipped"


def test_wiki_headings(tmp_path: Path) -> None:
    file = write(
        tmp_path / "wiki.raw", " = A = \n \n Text . \n = = Part = = \n More . \n = B = \n C ."
    )
    documents, _ = read(file)
    assert [document.text for document in documents] == [
        "= A =\nText .\n= = Part = =\nMore .",
        "= B =\nC .",
    ]
    assert [document.line for document in documents] == [1, 6]


def test_jsonl_and_gz(tmp_path: Path) -> None:
    records = '{"text": "One.\\nTwo.", "label": "x"}\n\n{"text": " "}\n{"text": "Three."}\n'
    plain = write(tmp_path / "a.jsonl", records)
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(records.encode()))
    text = write(tmp_path / "c.txt.gz", gzip.compress(b"Four.\nFive.\n"))
    documents, said = read(plain, packed, text)
    texts = ["One.\nTwo.", "Three."]
    assert [document.text for document in documents] == [*texts, *texts, "Four.", "Five."]
    assert documents[3] == Document("Three.", str(packed), 4)
    assert said[-1] == "corpus: 3 files, 6 documents; 2 documents without text skipped"


def test_folders_and_globs_are_sorted_and_read_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a/1.txt", "c.md", ".hidden.txt"):
        write(tmp_path / name, f"{name}.")
    write(tmp_path / "b/empty.txt", "")
    documents, said = read(tmp_path, tmp_path / "*" / "*.txt", tmp_path / "c.md")
    assert [document.text for document in documents] == [
        "a/1.txt.",
        "b/10.txt.",
        "b/2.txt.",
        "c.md.",
    ]
    assert "corpus: 2 empty files skipped" in said
    assert "corpus: 3 files named more than once, read once" in said


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", r"a\.txt: the file is empty"),
        (b" \n\n \n", "a.txt", r"a\.txt: no readable text"),
        (b"good\nb\xe9d\n", "a.txt", r"a\.txt: byte 6: not UTF-8"),
        (b"\xff\xfea\0b\0", "a.txt", r"a\.txt: byte 0: not UTF-8"),
        (b'{"text": "a"}\n{"text": \n', "a.jsonl", r"a\.jsonl:2: not JSON"),
        (b'{"body": "a", "id": 1}\n', "a.jsonl", r"a\.jsonl:1: no `text` field.*: body, id"),
        (b'{"text": 5}\n', "a.jsonl", r"a\.jsonl:1: no `text` field"),
        (b'["text"]\n', "a.jsonl", r"a\.jsonl:1: a JSON object.*got list"),
        (b'{"text": "\\ud800"}\n', "a.jsonl", r"a\.jsonl:1: .*surrogate"),
        (b"[" * 200_000, "a.jsonl", r"a\.jsonl:1: not JSON that can be read"),
        (b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl", r"a\.jsonl:1: not JSON that can be read"),
        (b"not packed", "a.txt.gz", r"a\.txt\.gz: broken gz archive"),
        (gzip.compress(b"some text " * 99)[:-12], "a.txt.gz", r"a\.txt\.gz: broken gz archive"),
        (b"{}", "a.json", r"a\.json: \.json is not read"),
    ],
)
def test_bad_files(content: bytes, name: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_missing_paths_are_told_before_anything_is_read(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", "Text.")
    with pytest.raises(InputError, match=r"gone\.txt: no such file or folder"):
        read_documents([good, tmp_path / "gone.txt"])
    with pytest.raises(InputError, match=r"\*\.md: no file matches"):
        read_documents([tmp_path / "*.md"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: no text files in this folder"):
        read_documents([tmp_path / "folder"])
    with pytest.raises(InputError, match="no text was named"):
        read_documents([])
    write(tmp_path / "folder" / "b.txt", "")
    with pytest.raises(InputError, match="every file found is empty"):
        read_documents([tmp_path / "folder"], say=lambda line: None)


def test_guess_is_said_when_it_changes_and_summed_up(tmp_path: Path) -> None:
    for name, content in {"a": "A.", "b": "B.", "c": "C.\n\nD."}.items():
        write(tmp_path / f"{name}.txt", content)
    _, said = read(tmp_path)
    assert [line.partition(" (")[0].removeprefix(f"{tmp_path}/") for line in said[:-1]] == [
        "a.txt: one document a line",
        "c.txt: documents separated by blank lines",
    ]
    assert said[-1] == (
        "corpus: 3 files, 4 documents; 2 files one document a line; "
        "1 file documents separated by blank lines"
    )


@needs_data
def test_gutenberg_novels() -> None:
    documents, said = read(DATA / "gutenberg-en")
    assert len(documents) == 8
    assert not any("START OF TH" in d.text or "Gutenberg-tm" in d.text for d in documents)
    assert "left out of 8 files" in said[-1] and "one document a file" in said[0]


@needs_data
def test_wikipedia_excerpts() -> None:
    english, _ = read(
        DATA / "enwiki-excerpt" / "AA_wiki_00", DATA / "enwiki-excerpt" / "AB_wiki_00"
    )
    assert len(english) == 37 + 66
    chinese, said = read(DATA / "zhwiki-excerpt")
    files = sorted((DATA / "zhwiki-excerpt").iterdir())
    blocks = sum(file.read_text("utf-8").count("<doc id=") for file in files)
    assert f"{blocks - len(chinese)} documents without text skipped" in said[-1]
    assert not any("<doc" in document.text for document in (*english, *chinese))


@needs_data
def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    documents, _ = read(DATA / "zhwiki-excerpt" / "AA_wiki_00")
    lines = [json.dumps({"text": document.text}) for document in documents]
    again, _ = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [document.text for document in again] == [document.text for document in documents]
