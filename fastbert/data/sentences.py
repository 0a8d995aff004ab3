# ruff: noqa: RUF001, RUF002
"""Sentence ends in English and Chinese text, by rule."""

from __future__ import annotations

import re

_LINE_END = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]+")
# a Latin full stop needs a space behind it, a Chinese one does not
_END = re.compile(r"""[.!?]+["'”’)\]]*\s+(?P<next>["'“‘(\[]*\S)|[。！？…]+["'”’」』）)]*(?=\S)""")
_ABBREVIATION = re.compile(
    r"""(?<![^\s("'“‘\[])(?:(?:[A-Za-z]\.)*[A-Za-z]|Mr|Mrs|Ms|Messrs|Dr|Prof|St|Rev|Gen|Col|Capt|
    Lt|Sgt|Hon|Jr|Sr|Vol|Fig|Eq|Sec|Ch|pp|cf|vs|al|etc|approx|viz|Inc|Ltd|Co|Corp|
    Jan|Feb|Mar|Apr|Aug|Sept?|Oct|Nov|Dec)\.$""",
    re.VERBOSE,
)
_LONGEST_ABBREVIATION = 10


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space around them; empty ones left out.

    A line end is a sentence end. After . ! ? white space and a capital, digit or quotation mark
    must follow (any letter where the line has no capitals at all); common abbreviations and
    initials do not end a sentence. Chinese 。！？ end one anywhere. What has no end stays whole.
    """
    sentences = []
    for line in _LINE_END.split(text):
        start = 0
        caseless: bool | None = None
        for match in _END.finditer(line):
            following = match["next"]
            if following is None:
                end = match.end()
            else:
                if following[-1].islower():
                    if caseless is None:
                        caseless = line.islower()
                    if not caseless:
                        continue
                end = match.start("next")
                mark = match.start() + 1
                if line[match.start()] == "." and _ABBREVIATION.search(
                    line, max(start, mark - _LONGEST_ABBREVIATION), mark
                ):
                    continue
            if sentence := line[start:end].strip():
                sentences.append(sentence)
            start = end
        if sentence := line[start:].strip():
            sentences.append(sentence)
    return sentences
