"""The text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zinit.tasks.chat import cut_at

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # ends a text whose last character has bytes to come


class AnswerText:
    """Decodes token by token, and holds back what may turn out to be no part of the answer.

    What it gives adds up to what decoding all tokens at once gives, as far as a tokenizer allows that.

    Args:
        tokenizer: of the model.
        ends: texts that end the answer and are no part of it.
        strip: leave out white space around the answer.

    Attributes:
        tokens: all so far.
        ended: whether one of the ends came.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[str] = (), *, strip: bool = True) -> None:
        self.tokenizer, self.ends, self.strip = tokenizer, tuple(filter(None, ends)), strip
        self.tokens: list[int] = []
        self.ended = False
        self._text = ""  # decoded so far
        self._sent = 0  # characters of `_visible` that were given
        self._start = self._read = 0  # tokens that are decoded again with new ones; tokens that are in `_text`

    def add(self, token: int) -> str:
        """What can be shown now that was not shown before."""
        self.tokens.append(token)
        known = self._decode(self.tokens[self._start : self._read])
        text = self._decode(self.tokens[self._start :])
        if text.endswith(UNFINISHED):
            return ""
        searched = max(0, len(self._text) - max(map(len, self.ends), default=0))
        self._text += text[len(known) :]
        self._start, self._read = self._read, len(self.tokens)
        if any(end in self._text[searched:] for end in self.ends):
            self.ended = True
            return ""
        return self._give(self._safe())

    def finish(self) -> tuple[str, str]:
        """What is left to show, and the whole answer."""
        whole = cut_at(self._decode(self.tokens), self.ends)
        whole = whole.strip() if self.strip else whole
        shown = self._visible(self._text)[: self._sent]
        return whole[len(shown) :] if whole.startswith(shown) else "", whole

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _visible(self, text: str) -> str:
        return text.lstrip() if self.strip else text

    def _safe(self) -> int:
        """How many characters are shown: no start of an end, no white space that may be the last."""
        text = self._visible(self._text)
        starts = ((end, n) for end in self.ends for n in range(min(len(end), len(text) + 1)))
        held = max((n for end, n in starts if text.endswith(end[:n])), default=0)
        text = text[: len(text) - held]
        return len(text.rstrip() if self.strip else text)

    def _give(self, end: int) -> str:
        start, self._sent = self._sent, max(self._sent, end)
        return self._visible(self._text)[start : self._sent]
