# ruff: noqa: RUF001
from __future__ import annotations

import pytest

from fastbert.data.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n\t\n", []),
        ("No end at all", ["No end at all"]),
        ("One. Two! Three?  4 men.", ["One.", "Two!", "Three?", "4 men."]),
        ("One\nTwo\r\nThree\u2028Four", ["One", "Two", "Three", "Four"]),
        ("Mr. Smith met Dr. J. K. Li. They left.", ["Mr. Smith met Dr. J. K. Li.", "They left."]),
        ("See Fig. 3, e.g. here, i.e. There. End.", ["See Fig. 3, e.g. here, i.e. There.", "End."]),
        (
            'He said "Go!" and left. "What?" he asked.',
            ['He said "Go!" and left.', '"What?" he asked.'],
        ),
        ("“Oh dear! I shall be late.” She ran.", ["“Oh dear!", "I shall be late.”", "She ran."]),
        ("robert is here . he was there .", ["robert is here .", "he was there ."]),
        ("Version 3.11 of torch.nn is out. Good", ["Version 3.11 of torch.nn is out.", "Good"]),
        (
            "今天很好。去公园！“好吗？”他问…好",
            ["今天很好。", "去公园！", "“好吗？”", "他问…", "好"],
        ),
        ("（他走了。）她来了。", ["（他走了。）", "她来了。"]),
    ],
)
def test_split_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_nothing_but_white_space_is_lost() -> None:
    text = 'A. B.C! D?" e.g. F… G。H .\x0bI\n\n J... K (L.) M? n! 好。 好'
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_a_long_line_takes_no_more_than_linear_time() -> None:
    assert len(split_sentences("word " * 200_000)) == 1
    assert len(split_sentences("a.. " * 50_000)) == 1
    assert len(split_sentences("One. " * 100_000)) == 100_000
