"""The text of an answer while it comes: nothing is shown that turns out to be no part of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tasks.talks import tokenizer
from zinit.serve.answer import AnswerText

CASES = [
    ("  Hel# lo##\n\n###x###", ("###",), True, "Hel# lo##"),
    ("  Hel# lo##\n\n###x", ("###",), False, "  Hel# lo##\n\n"),
    (" a b \n c  ", (), True, "a b \n c"),
    ("für 12 € 🙂 gut", ("€ 🙂 g",), True, "für 12"),
    ("für 12 € 🙂 gut", ("nie",), False, "für 12 € 🙂 gut"),
    ("ab#", ("###",), True, "ab#"),
    ("", ("###",), True, ""),
]


@pytest.mark.parametrize(("text", "ends", "strip", "expected"), CASES, ids=str)
def test_pieces_are_the_answer_as_far_as_it_is_certain(
    text: str, ends: tuple[str, ...], strip: bool, expected: str
) -> None:
    """One token is one byte: characters of several are shown when they are whole."""
    speaker = tokenizer("bytes")
    answer, shown = AnswerText(speaker, ends, strip=strip), ""
    for token in speaker(text, add_special_tokens=False)["input_ids"]:
        shown += answer.add(token)
        assert expected.startswith(shown)
        assert "\N{REPLACEMENT CHARACTER}" not in shown
        if answer.ended:
            break
    rest, whole = answer.finish()
    assert (shown + rest, whole) == (expected, expected)
    assert answer.ended == any(end in text for end in ends)
    if len(expected) > 5:
        assert len(shown) > len(expected) // 2, "it is shown while it comes"


class Slices(str):
    """A text that counts how often parts of it are made."""

    made = 0

    def __getitem__(self, key: Any) -> str:
        self.made += 1
        return super().__getitem__(key)


def test_a_long_end_costs_no_more_than_the_text_is_long() -> None:
    speaker, end = tokenizer("bytes"), Slices("ab" * 10_000)
    answer = AnswerText(speaker, [end])
    shown = "".join(answer.add(token) for token in speaker("ababx", add_special_tokens=False)["input_ids"])
    assert shown == "ababx"
    assert end.made < 50
