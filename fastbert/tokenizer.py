"""Vocabularies in the Hugging Face layout: WordPiece trained, others' of any kind loaded.

A thin wrapper over the `tokenizers` library. Devlin et al. (2019), section 3; Wu et al. (2016).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from fastbert.errors import InputError
from fastbert.files import atomic_write, writing_failed
from fastbert.special_tokens import (
    BERT,
    ROLES,
    continues_word,
    find_special_tokens,
    refuse_unknown_kind,
)

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = BERT
CONTINUATION = "##"
# a space among the characters that stand for bytes
_SPACE = "Ġ"

_FILES = ("tokenizer.json", "vocab.txt")
# the names of the settings in tokenizer_config.json and in tokenizer.json's BertNormalizer
_NORMALIZER_SETTINGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
# as transformers tidies up decoded text
_TIDY = (
    *((f" {mark}", mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)


class Tokenizer:
    """Text to ids and back: WordPiece, and the byte-level BPE and Unigram of other families.

    Attributes:
        vocab_size: number of ids, 0 to `vocab_size - 1`.
        pad_id, unk_id, cls_id, sep_id, mask_id: the five special ids.
        special_ids: the same five, as a tuple.
        special_tokens: their tokens, in that order.
        has_spaces_in_words: whether a token holds the space before it, as in byte-level BPE.
        lowercase: whether text is lower-cased before it is cut.
        lowercase_guessed: True when no file said so and the vocabulary was looked at.
        is_subword: `[vocab_size]` bool, True where the token continues a word: "##" in WordPiece,
            no mark of a space before it in the others.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        source: str = "tokenizer",
        lowercase_guessed: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: of WordPiece, BPE or Unigram.
            source: names it in error messages.
            lowercase_guessed: that no file said whether it lower-cases.
            config: tokenizer_config.json, for the names of the special tokens.

        Raises:
            InputError: another kind of model, a special token is missing, or ids have gaps.
        """
        refuse_unknown_kind(backend.model, source)
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
        if [index for _, index in tokens] != list(range(self.vocab_size)):
            raise InputError(f"{source}: the ids are not 0 to {self.vocab_size - 1} without gaps")
        self.special_tokens = find_special_tokens(dict(tokens), config or {}, source)
        self.tokens: tuple[str, ...] = tuple(token for token, _ in tokens)
        self.special_ids: tuple[int, ...] = tuple(
            index for index in map(backend.token_to_id, self.special_tokens) if index is not None
        )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.is_subword: np.ndarray = np.array(
            [continues_word(backend.model, token, self.special_tokens) for token in self.tokens],
            dtype=np.bool_,
        )
        self.has_spaces_in_words: bool = (
            isinstance(backend.model, models.BPE) and backend.token_to_id(_SPACE) is not None
        )
        self.lowercase: bool = bool(getattr(backend.normalizer, "lowercase", False))
        self.lowercase_guessed = lowercase_guessed

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load a folder with tokenizer.json or vocab.txt, or one of these files.

        tokenizer_config.json beside it decides do_lower_case, strip_accents and
        tokenize_chinese_chars; without one, tokenizer.json decides, and for a bare vocab.txt
        capitals in the vocabulary do.

        Raises:
            InputError: nothing there, unreadable or broken files, a special token missing.
        """
        path = Path(path)
        file = _tokenizer_file(path)
        config_file = file.parent / "tokenizer_config.json"
        config = _read_json(config_file) if config_file.is_file() else {}
        settings = _normalizer_settings(config, config_file)
        if file.suffix == ".json":
            return cls(_load_json(file, settings), source=str(file), config=config)
        tokens = _read_vocabulary(file)
        guessed = "lowercase" not in settings
        settings.setdefault("lowercase", not any(_has_capitals(token) for token in tokens))
        return cls(_build(tokens, settings, str(file)), source=str(file), lowercase_guessed=guessed)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, model_max_length: int | None = None
    ) -> None:
        """Write tokenizer.json, tokenizer_config.json and, of WordPiece, vocab.txt.

        Args:
            folder: made where missing; transformers' AutoTokenizer loads the same ids from it.
            model_max_length: the model's positions, where transformers is to truncate.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing_failed(folder, error) from error
        normalizer = self.backend.normalizer
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        word_piece = isinstance(self.backend.model, models.WordPiece)
        if word_piece:
            config = {
                theirs: getattr(normalizer, ours, None)
                for theirs, ours in _NORMALIZER_SETTINGS.items()
            }
            config["do_lower_case"] = self.lowercase
            config["tokenizer_class"] = "BertTokenizer"
            _write(folder / "vocab.txt", "".join(f"{token}\n" for token in self.tokens))
        named = zip(ROLES, self.special_tokens, strict=True)
        config.update({f"{role}_token": token for role, token in named})
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        _write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of what decides the ids: vocabulary, and how text is normalised."""
        normalizer = self.backend.normalizer
        settings = [getattr(normalizer, name, None) for name in _NORMALIZER_SETTINGS.values()]
        described = json.dumps([self.tokens, settings], ensure_ascii=True)
        if not isinstance(self.backend.model, models.WordPiece):
            # merges and scores decide as well
            described = self.backend.to_str()
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    def id_to_token(self, index: int) -> str:
        """The token of an id in 0 to `vocab_size - 1`."""
        return self.tokens[index]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None when the vocabulary does not hold it."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without [CLS] and [SEP]; "[MASK]" in the text is the mask."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, literal: bool = False) -> list[np.ndarray]:
        """Ids of many texts, one int32 array each, without [CLS] and [SEP].

        Args:
            texts: encoded in parallel by `tokenizers` (TOKENIZERS_PARALLELISM=false stops that).
            literal: read "[MASK]" and the like as ordinary text, as a corpus wants it.
        """
        self.backend.encode_special_tokens = literal
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one text and the `(start, end)` characters each came from."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids: pieces joined, spaces around English punctuation removed."""
        text: str = self.backend.decode(
            [int(index) for index in ids], skip_special_tokens=skip_special_tokens
        )
        if isinstance(self.backend.model, models.WordPiece):
            for spaced, tidy in _TIDY:
                text = text.replace(spaced, tidy)
        return text


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    progress: bool = False,
) -> Tokenizer:
    """Train a WordPiece vocabulary; the same texts give the same ids.

    Args:
        texts: read into memory once.
        vocab_size: the five special tokens included; small texts may give fewer.
        lowercase: lower-case and strip accents, as the uncased BERT models do.
        min_frequency: pieces seen less often are not joined.
        progress: show the trainer's own bars.

    Raises:
        InputError: no text, or no room for the characters.
    """
    texts = list(texts)
    backend = _pipeline(models.WordPiece(unk_token=UNK), {"lowercase": lowercase})
    alphabet = _alphabet(texts, backend, vocab_size)
    # the trainer numbers "##x" in the order of a randomly seeded hash map, and ties follow the
    # numbers; handing them over as special tokens, sorted, makes training repeatable
    continuations = [CONTINUATION + char for char in alphabet if _joins_words(char, backend)]
    fixed = [*SPECIAL_TOKENS, *continuations]
    if len(fixed) + len(alphabet) > vocab_size:
        raise InputError(
            f"vocab size {vocab_size}: {len(fixed) + len(alphabet)} are needed for the special "
            "tokens and the characters of the text alone; ask for more"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    vocabulary = backend.get_vocab()
    learnt = sorted(vocabulary, key=vocabulary.__getitem__)
    known = {*fixed, *alphabet}
    tokens = [
        *SPECIAL_TOKENS,
        *alphabet,
        *continuations,
        *(token for token in learnt if token not in known),
    ]
    return Tokenizer(_build(tokens, {"lowercase": lowercase}, "training"))


def _pipeline(model: models.WordPiece, settings: dict[str, Any]) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(**settings)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return backend


def _build(tokens: Sequence[str], settings: dict[str, Any], source: str) -> Backend:
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        first = vocabulary.setdefault(token, index)
        if first < index:
            raise InputError(
                f"{source}: line {index + 1}: the token {token!r} is there already, "
                f"in line {first + 1}"
            )
    backend = _pipeline(models.WordPiece(vocabulary, unk_token=UNK), settings)
    _add_special_tokens(backend, vocabulary)
    return backend


def _add_special_tokens(backend: Backend, vocabulary: dict[str, int]) -> None:
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in SPECIAL_TOKENS
            if token in vocabulary
        ]
    )
    if CLS in vocabulary and SEP in vocabulary:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{CLS}:0 $A:0 {SEP}:0",
            pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
            special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
        )


def _alphabet(texts: Sequence[str], backend: Backend, vocab_size: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(backend.normalizer.normalize_str(text))
    kept = [char for char in counts if not char.isspace()]
    if not kept:
        raise InputError("tokenizer training: there is no text to learn from")
    # with their "##" twins half the vocabulary at most: rare characters leave room for words
    limit = max(vocab_size // 4, 1)
    kept.sort(key=lambda char: (-counts[char], char))
    return sorted(kept[:limit])


def _joins_words(char: str, backend: Backend) -> bool:
    word = backend.normalizer.normalize_str(f"a{char}")
    return len(backend.pre_tokenizer.pre_tokenize_str(word)) == 1


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(
            f"{path}: not found; a local folder with {' or '.join(_FILES)} is wanted, "
            "or one of these files"
        )
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: holds neither {' nor '.join(_FILES)}")


def _load_json(file: Path, settings: dict[str, Any]) -> Backend:
    _read_json(file)
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:
        raise InputError(f"{file}: not a tokenizer that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        for name, value in settings.items():
            setattr(backend.normalizer, name, value)
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: line {error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a JSON object is wanted, got {type(content).__name__}")
    return content


def _normalizer_settings(config: dict[str, Any], file: Path) -> dict[str, bool]:
    settings = {}
    for theirs, ours in _NORMALIZER_SETTINGS.items():
        value = config.get(theirs)
        if value is None:
            continue
        if not isinstance(value, bool):
            raise InputError(f"{file}: {theirs} must be true, false or null, got {value!r}")
        settings[ours] = value
    return settings


def _read_vocabulary(file: Path) -> list[str]:
    # only "\n" ends a line: the Chinese vocabulary holds U+2028 inside two tokens
    lines = _read_text(file).split("\n")
    if lines[-1] == "":
        lines.pop()
    if all(line.endswith("\r") for line in lines):
        lines = [line[:-1] for line in lines]
    return lines


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start}: not UTF-8") from error
    if not text.strip():
        raise InputError(f"{file}: the file is empty")
    return text


def _has_capitals(token: str) -> bool:
    return not re.fullmatch(r"\[.*\]|<.*>", token) and re.search("[A-Z]", token) is not None


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)
