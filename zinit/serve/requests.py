"""What is asked of the engine, and what it answers: the words between it and whatever serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from zinit.errors import ZinitError

BASE = "base"  # the model without an adapter

Reason = Literal["stop", "length"]


class Refused(ZinitError):
    """A request that cannot be taken.

    Args:
        message: what was given, what is expected.
        status: as HTTP has it.
        code: a word for programs.
        parameter: of the request, if one is to blame.
    """

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, parameter: str | None = None):
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes on.

    Args:
        batch: answers that are generated at once.
        queue: answers that may wait.
        prompt_tokens: of one prompt; None is as many as the model has room for.
        new_tokens: of one answer.
        prefill_tokens: read at once, padding included, before those that are being answered get their next token.
        seconds: from the arrival of a request to the end of its answers.
        body_bytes: of one request.
        images: of one request.
        pixels: of one image.
        choices: answers to one request, prompts x n.
    """

    batch: int = 64
    queue: int = 256
    prompt_tokens: int | None = None
    new_tokens: int = 4096
    prefill_tokens: int = 8192
    seconds: float = 600.0
    body_bytes: int = 16 * 2**20
    images: int = 8
    pixels: int = 20_000_000
    choices: int = 64


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are generated.

    Args:
        max_tokens: longest answer; it may end earlier, where the model has no room left.
        temperature: 0, and what is below 0.0001, takes the likeliest token.
        top_p: nucleus sampling.
        seed: of what is drawn; None is another one each time.
        stop: texts that end an answer and are no part of it.
        n: answers to each prompt.
        logprobs: how many of the likeliest tokens are reported beside each chosen one; None reports nothing.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message of a chat.

    Attributes:
        role: "system", "user" or "assistant".
        text: what is said.
        images: the content of image files, in order.
    """

    role: str
    text: str
    images: Sequence[bytes] = ()


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token and how likely it was.

    Attributes:
        token: its text.
        logprob: of the model's own distribution, before temperature and top_p.
        top: (text, log probability) of the likeliest tokens.
    """

    token: str
    logprob: float
    top: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """More of an answer.

    Attributes:
        index: of the answer among those of the request.
        text: what comes next; may be empty.
        logprobs: of the tokens since the last piece, where they are asked for.
        reason: why the answer is over; None where it is not.
        tokens: of the whole answer; on the last piece.
        answer: all of its text; on the last piece.
    """

    index: int
    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    reason: Reason | None = None
    tokens: Sequence[int] = ()
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request that came to nothing; no further event follows.

    Attributes:
        message: for the user; nothing of other requests, no path, no trace.
        status: as HTTP has it.
    """

    message: str
    status: int = 500


Event = Piece | Failed
Deliver = Callable[[Event], None]


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A request that was taken.

    Attributes:
        prompt_tokens: of all prompts.
        choices: answers that are to come.
        cancelled: set by `cancel`; its answers leave before the next token.
    """

    prompt_tokens: int
    choices: int
    cancelled: bool = field(default=False)

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        self.cancelled = True


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that can be asked.

    Attributes:
        id: its name in requests.
        sees: whether it takes images.
        created: seconds since 1970, when it was loaded.
    """

    id: str
    sees: bool
    created: int


class Service(Protocol):
    """What answers; `zinit.serve.engine.Engine` does. May be called from any thread; events come from another one."""

    @property
    def limits(self) -> Limits: ...

    def models(self) -> list[ModelInfo]:
        """All models, the base first."""
        ...

    def chat(self, model: str, turns: Sequence[Turn], sampling: Sampling, deliver: Deliver) -> Ticket:
        """Asks for answers to a conversation.

        Raises:
            Refused: if it cannot be taken; no event comes then.
        """
        ...

    def complete(self, model: str, prompts: Sequence[str], sampling: Sampling, deliver: Deliver) -> Ticket:
        """Asks for continuations of texts as they stand; see `chat`."""
        ...

    def load(self, name: str, source: str) -> None:
        """Adds an adapter while others are being asked.

        Raises:
            Refused, ZinitError: if it cannot be loaded.
        """
        ...

    def unload(self, name: str) -> None:
        """Takes an adapter away; those of its answers that are not at their end fail.

        Raises:
            Refused: if there is none.
        """
        ...

    def gauges(self) -> dict[str, int]:
        """How much goes on: "waiting", "running", "models"."""
        ...
