from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_documents, tiny_tokenizer

from fastbert.data import prepare as module
from fastbert.data.cache import shards_of
from fastbert.data.prepare import prepare
from fastbert.data.sentences import split_sentences
from fastbert.data.shards import MANIFEST, Manifest, open_folder
from fastbert.errors import InputError
from fastbert.tokenizer import train_tokenizer

DOCUMENTS = tiny_documents(60)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 4000)


@pytest.fixture
def text(tmp_path) -> list[str]:
    """The same documents in several files and forms."""
    records = [json.dumps({"text": document}) for document in DOCUMENTS[:20]]
    (tmp_path / "a.jsonl").write_text("\n".join(records) + "\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n\n".join(DOCUMENTS[20:40]))
    (tmp_path / "c.txt").write_text("\n\n".join(DOCUMENTS[40:]) + "\n\n...\n\n \x01 \n\n")
    return [str(tmp_path / name) for name in ("a.jsonl", "b.txt.gz", "c.txt")]


def quiet(line: str) -> None:
    pass


def write(text, out, **changes) -> Manifest:
    arguments = {"doc_sep": "blank", "workers": 1, "shard_tokens": 3000, "say": quiet} | changes
    return prepare(text, tiny_tokenizer(), out, **arguments)


def all_ids(folder) -> np.ndarray:
    return np.concatenate([c.ids for c in open_folder(folder, tiny_tokenizer().fingerprint)[1]])


def expected_ids() -> np.ndarray:
    sentences = [sentence for document in DOCUMENTS for sentence in split_sentences(document)]
    return np.concatenate(tiny_tokenizer().encode_batch(sentences, literal=True))


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("shard-*")}


def test_shards_hold_every_token_in_order(text, tmp_path):
    manifest = write(text, tmp_path / "shards")
    assert len(manifest.shards) > 2 and manifest.complete
    assert np.array_equal(all_ids(tmp_path / "shards"), expected_ids())
    assert manifest.documents == len(DOCUMENTS)
    assert manifest.skipped == {
        "documents without text": 2,
        "documents without tokens": 0,
        "sentences without tokens": 0,
    }
    corpora = open_folder(tmp_path / "shards", tiny_tokenizer().fingerprint)[1]
    assert all(isinstance(corpus.ids, np.memmap) for corpus in corpora)
    assert sum(corpus.documents for corpus in corpora) == len(DOCUMENTS)


def test_the_number_of_processes_changes_nothing(text, tmp_path):
    one, two = write(text, tmp_path / "1"), write(text, tmp_path / "2", workers=2)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert one.checksum == two.checksum


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_call_cut_short_is_taken_up_where_it_stopped(after, text, tmp_path, monkeypatch):
    whole = write(text, tmp_path / "whole")
    encoded = []
    original = module.encode_block

    def encode(texts):
        encoded.append(len(texts))
        if len(encoded) > after:
            raise KeyboardInterrupt
        return original(texts)

    monkeypatch.setattr(module, "encode_block", encode)
    with pytest.raises(KeyboardInterrupt):
        write(text, tmp_path / "cut")
    done = Manifest.load(tmp_path / "cut")
    assert not done.complete
    with pytest.raises(InputError, match="not finished"):
        open_folder(tmp_path / "cut", tiny_tokenizer().fingerprint)
    redone = []
    monkeypatch.setattr(
        module, "encode_block", lambda texts: (redone.append(len(texts)), original(texts))[1]
    )
    again = write(text, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert (again.checksum, again.skipped) == (whole.checksum, whole.skipped)
    # documents of finished shards are not encoded again
    assert sum(redone) == len(DOCUMENTS) - done.documents


KILLED = """if True:
    import sys
    from fastbert.data import prepare as module
    from fastbert.tokenizer import Tokenizer
    module.BLOCK_CHARACTERS = 4000
    if __name__ == "__main__":
        out, tokenizer, *text = sys.argv[1:]
        module.prepare(
            text, Tokenizer.from_pretrained(tokenizer), out, doc_sep="blank", workers=1,
            shard_tokens=3000,
        )
"""


def test_killed_processes_lose_unfinished_shards_alone(text, tmp_path, root):
    """kill -9 as soon as a further shard is there, again and again."""
    write(text, tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "tok")
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(out), str(tmp_path / "tok"), *text]
    environment = os.environ | {"PYTHONPATH": str(root)}
    for wanted in (1, 2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(files(out)) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    write(text, out)
    assert files(out) == files(tmp_path / "whole")


def test_small_text_starts_no_processes(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 4)
    monkeypatch.setattr(module, "worker_pool", lambda *_: pytest.fail("a pool was started"))
    write(text, tmp_path / "shards", workers=None)
    monkeypatch.setattr(module, "BYTES_A_PROCESS", 10_000)
    assert module._worth(Manifest.load(tmp_path / "shards")) == 4


def test_two_processes_do_not_share_a_folder(text, tmp_path):
    out = tmp_path / "shards"
    write(text, out)
    with module.locked(out), pytest.raises(InputError, match="another process works here"):
        write(text, out)


def test_finished_folders_are_left_alone(text, tmp_path):
    write(text, tmp_path / "shards")
    before = files(tmp_path / "shards")
    said = []
    write(text, tmp_path / "shards", say=said.append)
    assert "finished already" in said[-1] and files(tmp_path / "shards") == before


def test_folders_of_other_text_are_refused(text, tmp_path):
    write(text, tmp_path / "shards")
    with pytest.raises(InputError, match="other text, or text that has changed since"):
        write(text[:2], tmp_path / "shards")
    with pytest.raises(InputError, match="holds shards of --doc-sep blank"):
        write(text, tmp_path / "shards", doc_sep="line")
    with pytest.raises(InputError, match="holds shards of another vocabulary"):
        prepare(text, train_tokenizer(DOCUMENTS, 100), tmp_path / "shards", doc_sep="blank")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        write(text, tmp_path / "other")
    with pytest.raises(InputError, match="is no folder"):
        write(text, text[0])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "deleted": (lambda path: path.unlink(), "the shard is missing"),
    "a bit flipped": (flip_a_bit, "its bytes do not fit its checksum"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:2000]), "cut off"),
    "no shard": (lambda path: path.write_bytes(b"x" * 4000), "damaged header"),
    "another shard": (
        lambda path: path.write_bytes((path.parent / "shard-00000.bin").read_bytes()),
        "not the shard that manifest.json names",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_named(damage, text, tmp_path):
    write(text, tmp_path / "shards")
    path = tmp_path / "shards" / "shard-00001.bin"
    change, message = DAMAGES[damage]
    change(path)
    with pytest.raises(InputError, match=message) as failure:
        open_folder(tmp_path / "shards", tiny_tokenizer().fingerprint)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


def test_shards_of_another_vocabulary_are_refused(text, tmp_path):
    write(text, tmp_path / "shards")
    with pytest.raises(InputError, match="prepared with another vocabulary"):
        open_folder(tmp_path / "shards", train_tokenizer(DOCUMENTS, 100).fingerprint)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 9}'])
def test_unreadable_manifests(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: ") as failure:
        open_folder(tmp_path, tiny_tokenizer().fingerprint)
    assert "\n" not in str(failure.value)


def test_text_is_prepared_once_and_found_by_its_content(text, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_cores", lambda: 1)
    first = shards_of(text, tiny_tokenizer(), doc_sep="blank", say=quiet)
    said = []
    assert shards_of(text, tiny_tokenizer(), doc_sep="blank", say=said.append) == first
    assert said == [f"text prepared before: {first}"]
    Path(text[2]).write_text(Path(text[2]).read_text() + "\n\nAnother river.")
    assert shards_of(text, tiny_tokenizer(), doc_sep="blank", say=quiet) != first
    assert shards_of([str(first)], tiny_tokenizer(), say=quiet) == first
    with pytest.raises(InputError, match="a folder of shards stands alone"):
        shards_of([str(first), text[0]], tiny_tokenizer())


def test_columns_and_zst(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastbert[data]'")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'fastbert[data]'")
    zstandard = pytest.importorskip("zstandard", reason="pip install 'fastbert[data]'")
    table = pyarrow.table({"text": DOCUMENTS[:30], "id": list(range(30))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    packed = zstandard.compress("\n\n".join(DOCUMENTS[30:]).encode())
    (tmp_path / "b.txt.zst").write_bytes(packed)
    write([str(tmp_path / "a.parquet"), str(tmp_path / "b.txt.zst")], tmp_path / "shards")
    assert np.array_equal(all_ids(tmp_path / "shards"), expected_ids())
    (tmp_path / "b.txt.zst").write_bytes(b"nothing packed")
    with pytest.raises(InputError, match="broken zst archive"):
        write([str(tmp_path / "b.txt.zst")], tmp_path / "other")
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"a\.parquet: cannot read"):
        write([str(tmp_path / "a.parquet")], tmp_path / "third")


def test_data_sets_in_the_hub_s_form(tmp_path):
    pytest.importorskip("datasets", reason="pip install 'fastbert[data]'")
    (tmp_path / "set").mkdir()
    records = [json.dumps({"text": document}) for document in DOCUMENTS]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(records))
    write([f"hf:{tmp_path / 'set'}"], tmp_path / "shards")
    assert np.array_equal(all_ids(tmp_path / "shards"), expected_ids())
    with pytest.raises(InputError, match="hf:nobody/nothing: cannot read the data set"):
        write(["hf:nobody/nothing"], tmp_path / "other")


def test_bad_numbers(text, tmp_path):
    for changes, message in (
        ({"shard_tokens": 0}, "--shard-tokens must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            write(text, tmp_path / "shards", **changes)
