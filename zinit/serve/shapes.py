"""Answers in the form of OpenAI's documents."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from zinit.serve.requests import Piece, TokenLogprob


def usage(prompt: int, generated: int) -> dict[str, int]:
    """The counts of tokens; those that end an answer are among them."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


@dataclass(kw_only=True)
class Shape(ABC):
    """The documents of one request.

    Args:
        model: that was asked.
        with_logprobs: whether log probabilities were asked for.
    """

    model: str
    with_logprobs: bool
    made: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)
    prefix = ""
    kind = ""
    chunk_kind = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def document(self, pieces: Sequence[Piece], prompt_tokens: int) -> dict[str, Any]:
        """All answers at once."""
        last = sorted((piece for piece in pieces if piece.reason is not None), key=lambda piece: piece.index)
        choices = []
        for piece in last:
            logprobs = [each for other in pieces if other.index == piece.index for each in other.logprobs]
            choices.append(self._choice(piece, logprobs))
        generated = sum(len(piece.tokens) for piece in last)
        return {**self._head(self.kind), "choices": choices, "usage": usage(prompt_tokens, generated)}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece."""
        return {**self._head(self.chunk_kind), "choices": [self._part(piece)]}

    def usage_chunk(self, prompt: int, generated: int) -> dict[str, Any]:
        """The counts, behind all pieces."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": usage(prompt, generated)}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        return []

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.made, "model": self.model}

    @abstractmethod
    def _choice(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]: ...

    @abstractmethod
    def _part(self, piece: Piece) -> dict[str, Any]: ...


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        parts = [{"index": index, "delta": first, "logprobs": None, "finish_reason": None} for index in range(choices)]
        return [{**self._head(self.chunk_kind), "choices": [part]} for part in parts]

    def _choice(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.answer, "refusal": None}
        return {
            "index": piece.index,
            "message": message,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": piece.reason,
        }

    def _part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.logprobs)
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.reason}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None

        def one(token: str, logprob: float) -> dict[str, Any]:
            return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

        content = [{**one(e.token, e.logprob), "top_logprobs": [one(*pair) for pair in e.top]} for e in found]
        return {"content": content, "refusal": None}


@dataclass(kw_only=True)
class CompletionShape(Shape):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    lengths: dict[int, int] = field(default_factory=dict)  # characters of the tokens so far, by answer

    def _choice(self, piece: Piece, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return self._text(piece, piece.answer, logprobs)

    def _part(self, piece: Piece) -> dict[str, Any]:
        return self._text(piece, piece.text, piece.logprobs)

    def _text(self, piece: Piece, text: str, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        logprobs = None
        if self.with_logprobs:
            logprobs = {
                "tokens": [each.token for each in found],
                "token_logprobs": [each.logprob for each in found],
                "top_logprobs": [dict(each.top) for each in found],
                "text_offset": self._offsets(piece.index, found),
            }
        return {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": piece.reason}

    def _offsets(self, index: int, found: Sequence[TokenLogprob]) -> list[int]:
        """Where each token begins in the answer."""
        ends = list(accumulate((len(each.token) for each in found), initial=self.lengths.get(index, 0)))
        self.lengths[index] = ends[-1]
        return ends[:-1]
