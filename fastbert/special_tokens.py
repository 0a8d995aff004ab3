"""What tokenizers of other families call their special tokens, and how they mark a word's start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import models

from fastbert.errors import InputError

ROLES = ("pad", "unk", "cls", "sep", "mask")
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# of BERT, of fairseq's RoBERTa and XLM-R, of ALBERT
_KNOWN = (
    BERT,
    ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"),
)
# whether a token that is not special goes on with a word
_CONTINUES: Mapping[type, Callable[[str], bool]] = {
    models.WordPiece: lambda token: token.startswith("##"),
    models.BPE: lambda token: not token.startswith("Ġ"),
    models.Unigram: lambda token: not token.startswith("▁"),
}


def refuse_unknown_kind(model: object, source: str) -> None:
    """Hold a tokenizer's model against the kinds that encoders come with.

    Raises:
        InputError: none of WordPiece, BPE and Unigram.
    """
    if type(model) not in _CONTINUES:
        kinds = ", ".join(kind.__name__ for kind in _CONTINUES)
        raise InputError(f"{source}: a vocabulary of {kinds} is wanted, got {type(model).__name__}")


def find_special_tokens(
    vocabulary: Mapping[str, int], config: Mapping[str, Any], source: str
) -> tuple[str, ...]:
    """The tokens in the order of ROLES.

    Args:
        vocabulary: ids by token.
        config: tokenizer_config.json, whose "cls_token" and the like are believed.
        source: for messages.

    Raises:
        InputError: a special token is missing.
    """
    most = max(_KNOWN, key=lambda tokens: sum(token in vocabulary for token in tokens))
    named = [config.get(f"{role}_token") for role in ROLES]
    # a token with its settings, as transformers writes some
    named = [name.get("content") if isinstance(name, dict) else name for name in named]
    tokens = tuple(
        name if isinstance(name, str) else known for name, known in zip(named, most, strict=True)
    )
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise InputError(
            f"{source}: the vocabulary lacks {', '.join(missing)}; "
            f"all of {', '.join(tokens)} are needed"
        )
    return tokens


def continues_word(model: object, token: str, special: tuple[str, ...]) -> bool:
    """Whether a token goes on with the word before it."""
    return token not in special and _CONTINUES[type(model)](token)
