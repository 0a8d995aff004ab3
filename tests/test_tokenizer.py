from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FASTBERT_DATA", ROOT.parent / "shared" / "data"))
GOLDEN_FILE = DATA / "golden" / "wordpiece" / "golden_wordpiece.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text("utf-8")) if GOLDEN_FILE.is_file() else None
VOCABULARIES = {"bert-base-uncased": 30522, "bert-base-cased": 28996, "bert-base-chinese": 21128}
TEXTS = [
    "The quick brown fox jumps over the lazy dog, the quicker fox jumped.",
    "A naïve café: brown dogs and foxes are jumping quickly!",
    "深度学习的模型。模型很快。",
] * 3
SAMPLE = "Héllo World! The quickest [MASK] jumps 深度\u2028学习 unaffable\tx\x00y \U0001f600"

needs_data = pytest.mark.skipif(GOLDEN is None, reason=f"{GOLDEN_FILE} is missing")


def vocabulary_file(folder: Path, tokens: list[str], end: str = "\n") -> Path:
    file = folder / "vocab.txt"
    file.write_bytes("".join(token + end for token in tokens).encode())
    return file


def golden_cases() -> list[dict]:
    return GOLDEN["transformers_js"]["cases"] if GOLDEN else []


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_vocabularies(name: str) -> None:
    tokenizer = Tokenizer.from_pretrained(DATA / "vocab" / name)
    assert tokenizer.vocab_size == VOCABULARIES[name]
    assert tokenizer.lowercase == (name != "bert-base-cased")
    assert tokenizer.lowercase_guessed
    lines = (DATA / "vocab" / name / "vocab.txt").read_bytes().decode().split("\n")[:-1]
    assert tokenizer.tokens == tuple(lines)
    assert [tokenizer.id_to_token(index) for index in tokenizer.special_ids] == list(SPECIAL_TOKENS)
    assert tokenizer.is_subword.tolist() == [line.startswith("##") for line in lines]


@needs_data
def test_chinese_line_separator_entries(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(DATA / "vocab" / "bert-base-chinese")
    for _ in range(2):
        assert tokenizer.token_to_id("\u2028") == 343
        assert tokenizer.token_to_id("##\u2028") == 13502
        assert tokenizer.vocab_size == 21128
        tokenizer.save_pretrained(tmp_path)
        tokenizer = Tokenizer.from_pretrained(tmp_path / "vocab.txt")


@needs_data
def test_chinese_vocabulary_with_crlf_keeps_its_ids(tmp_path: Path) -> None:
    data = (DATA / "vocab" / "bert-base-chinese" / "vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(data.replace(b"\n", b"\r\n"))
    plain = Tokenizer.from_pretrained(DATA / "vocab" / "bert-base-chinese")
    assert Tokenizer.from_pretrained(tmp_path).tokens == plain.tokens


@needs_data
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: f"{case['vocab']}-{case['name']}")
def test_golden_transformers_js(case: dict, tmp_path: Path) -> None:
    source = DATA / "vocab" / case["vocab"] / "vocab.txt"
    (tmp_path / "vocab.txt").write_bytes(source.read_bytes())
    config = {"do_lower_case": case["do_lower_case"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.lowercase == case["do_lower_case"] and not tokenizer.lowercase_guessed
    ids = [tokenizer.cls_id]
    for text in filter(None, (case["text"], case["text_pair"])):
        assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
        ids += [*tokenizer.encode(text), tokenizer.sep_id]
    if not case["text"]:
        ids.append(tokenizer.sep_id)
    assert ids == case["ids"]
    pair = tokenizer.backend.encode(case["text"], case["text_pair"])
    assert pair.ids == case["ids"]
    inner = [index for index in ids if index not in (tokenizer.cls_id, tokenizer.sep_id)]
    assert [tokenizer.id_to_token(index) for index in inner] == case["tokens"]
    if case["decoded"] is not None:
        assert tokenizer.decode(ids) == case["decoded"]


@needs_data
def test_golden_hf_tokenizers_offsets_and_type_ids() -> None:
    tokenizer = Tokenizer.from_pretrained(DATA / "vocab" / "bert-base-uncased")
    for case in GOLDEN["hf_tokenizers"]["cases"]:
        pair = tokenizer.backend.encode(case["text"], case["text_pair"])
        assert pair.ids == case["ids"] and pair.tokens == case["tokens"]
        assert pair.type_ids == case["type_ids"]
        assert pair.offsets == [tuple(offsets) for offsets in case["offsets"]]
        ids, offsets = tokenizer.encode_with_offsets(case["text"])
        assert ids == case["ids"][1 : 1 + len(ids)]
        assert offsets == [tuple(pair) for pair in case["offsets"][1 : 1 + len(ids)]]


@needs_data
def test_golden_google(tmp_path: Path) -> None:
    google = GOLDEN["google_bert"]
    full = google["full_tokenizer"]
    # the two specials that Google's test leaves out go last, where they shift no id
    vocabulary_file(tmp_path, [*full["vocab"], "[PAD]", "[MASK]"])
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.lowercase == full["do_lower_case"]
    assert tokenizer.encode(full["text"]) == full["ids"]
    assert [tokenizer.id_to_token(index) for index in full["ids"]] == full["tokens"]
    vocabulary_file(tmp_path, [*google["wordpiece"]["vocab"], "[PAD]", "[MASK]"])
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for case in google["wordpiece"]["cases"]:
        ids = tokenizer.encode(case["text"])
        assert [tokenizer.id_to_token(index) for index in ids] == case["tokens"]


@needs_data
def test_golden_google_basic_tokenizer(tmp_path: Path) -> None:
    for case in GOLDEN["google_bert"]["basic_tokenizer"]:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"do_lower_case": case["do_lower_case"]})
        )
        vocabulary_file(tmp_path, [*SPECIAL_TOKENS, *dict.fromkeys(case["tokens"])])
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        ids = tokenizer.encode(case["text"])
        assert [tokenizer.id_to_token(index) for index in ids] == case["tokens"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_train_save_and_load_in_transformers(lowercase: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(TEXTS, 400, lowercase=lowercase)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    tokenizer.save_pretrained(tmp_path, model_max_length=64)
    for loaded in (
        Tokenizer.from_pretrained(tmp_path),
        Tokenizer.from_pretrained(tmp_path / "vocab.txt"),
    ):
        assert loaded.tokens == tokenizer.tokens
        assert loaded.lowercase == lowercase and not loaded.lowercase_guessed
        assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)
    for kind in (transformers.AutoTokenizer, transformers.BertTokenizerFast):
        theirs = kind.from_pretrained(str(tmp_path))
        assert theirs.model_max_length == 64
        assert theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE)
        pair = theirs(SAMPLE, TEXTS[0])
        first, second = tokenizer.encode(SAMPLE), tokenizer.encode(TEXTS[0])
        assert pair["input_ids"] == [2, *first, 3, *second, 3]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert tokenizer.backend.encode(SAMPLE, TEXTS[0]).ids == pair["input_ids"]


@needs_data
@pytest.mark.parametrize("name", VOCABULARIES)
def test_saved_real_vocabulary_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(DATA / "vocab" / name)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE)


def test_training_is_repeatable_across_processes() -> None:
    code = (
        "import sys, json; from fastbert.tokenizer import train_tokenizer; "
        "print(json.dumps(train_tokenizer(json.loads(sys.argv[1]), 130).tokens))"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for _ in range(2)
    )
    assert first == second
    assert json.loads(first) == list(train_tokenizer(TEXTS, 130).tokens)


def test_trained_vocabulary_spells_every_word_of_its_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    for ids in tokenizer.encode_batch(TEXTS):
        assert ids.dtype == np.int32 and tokenizer.unk_id not in ids
    assert tokenizer.decode(tokenizer.encode("The lazy fox.")) == "the lazy fox."
    assert "深" in tokenizer.tokens and "##深" not in tokenizer.tokens


def test_literal_reads_special_tokens_as_text() -> None:
    tokenizer = train_tokenizer([*TEXTS, "a [mask] b"], 400)
    text = "a [MASK] b"
    assert tokenizer.mask_id in tokenizer.encode(text)
    (literal,) = tokenizer.encode_batch([text], literal=True)
    assert literal.tolist() == tokenizer.encode("a [mask] b")
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_truncation_and_padding_of_a_foreign_file_are_dropped(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    tokenizer.backend.enable_truncation(3)
    tokenizer.backend.enable_padding(length=5)
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert len(loaded.encode(TEXTS[0])) > 5
    assert len(loaded.encode("fox")) < 5


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    file = vocabulary_file(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "a"])
    with pytest.raises(InputError, match=r"vocab\.txt: the vocabulary lacks \[SEP\], \[MASK\]"):
        Tokenizer.from_pretrained(file)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bert-base-uncased: not found; a local folder"):
        Tokenizer.from_pretrained("bert-base-uncased")
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor vocab\.txt"):
        Tokenizer.from_pretrained(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_bytes(b"")
    with pytest.raises(InputError, match=r"vocab\.txt: the file is empty"):
        Tokenizer.from_pretrained(tmp_path)
    vocabulary.write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(InputError, match=r"vocab\.txt: byte 6: not UTF-8"):
        Tokenizer.from_pretrained(tmp_path)
    vocabulary_file(tmp_path, [*SPECIAL_TOKENS, "a", "b", "a"])
    with pytest.raises(InputError, match=r"vocab\.txt: line 8: the token 'a' .*line 6"):
        Tokenizer.from_pretrained(tmp_path)
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model":\n')
    with pytest.raises(InputError, match=r"tokenizer\.json: line 2: not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    for deep in ("[" * 200_000 + "]" * 200_000, '{"a": ' + "1" * 5000 + "}"):
        broken.write_text(deep)
        with pytest.raises(InputError, match=r"tokenizer\.json: not JSON that can be read"):
            Tokenizer.from_pretrained(tmp_path)
    broken.write_text("[]")
    with pytest.raises(InputError, match="a JSON object is wanted, got list"):
        Tokenizer.from_pretrained(tmp_path)
    broken.write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"vocabulary of WordPiece, BPE, Unigram.*got WordLevel"):
        Tokenizer.from_pretrained(tmp_path)
    Backend(models.BPE({"a": 0, "<s>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"lacks <pad>, <unk>, </s>, <mask>; all of <pad>, "):
        Tokenizer.from_pretrained(tmp_path)


def foreign_tokenizer(kind: str, texts: Sequence[str] = TEXTS) -> Any:
    """As RoBERTa (byte-level BPE) and XLM-R (Unigram) have theirs."""
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "BPE":
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        backend = Backend(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    backend.train_from_iterator([*texts] * 3, trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
@pytest.mark.parametrize("with_config", [False, True])
def test_tokenizers_of_other_families(kind: str, with_config: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    foreign_tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
    if with_config:
        named = {"cls_token": "<s>", "mask_token": {"content": "<mask>", "lstrip": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.special_ids == (1, 3, 0, 2, 4)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    lines = [*TEXTS, "a <mask> café 深度", ""]
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    assert [ours.encode(line) for line in lines] == expected
    assert [ids.tolist() for ids in ours.encode_batch(lines)] == expected
    ids = ours.encode(" quick brown")
    starts = [not ours.is_subword[index] for index in ids]
    assert starts[0] and sum(starts) >= 2 and not any(ours.is_subword[list(ours.special_ids)])
    ours.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(lines, add_special_tokens=False)["input_ids"] == expected
    assert again.mask_token_id == 4 and again.pad_token_id == 1


def test_training_without_text_or_room() -> None:
    with pytest.raises(InputError, match="no text"):
        train_tokenizer(["", " \n"], 100)
    with pytest.raises(InputError, match="vocab size 6"):
        train_tokenizer(TEXTS, 6)


@pytest.mark.parametrize("name", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
@pytest.mark.parametrize("value", ["yes", 1])
def test_a_setting_that_is_no_truth_value(tmp_path: Path, name: str, value: object) -> None:
    vocabulary_file(tmp_path, [*SPECIAL_TOKENS, "a"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: value}))
    message = rf"tokenizer_config\.json: {name} must be true, false or null, got {value!r}"
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(tmp_path)
