"""How a task's model is talked to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from zinit.data.conversations import Conversation, Round
from zinit.errors import ConfigError


class ChatFormat(Protocol):
    """Makes prompts of conversations.

    Attributes:
        stop_tokens: tokens that end an answer.
        stop_strings: texts that end one too, and are no part of it.
    """

    @property
    def stop_tokens(self) -> Sequence[int]: ...

    @property
    def stop_strings(self) -> Sequence[str]: ...

    def prompt(self, conversation: Conversation) -> list[int]:
        """The tokens that an answer to the last question starts from."""
        ...


class PromptFormat:
    """That of a task that formats prompts as texts, and knows no system text.

    Args:
        task: the class whose `Task.format_prompt` and `Task.format_conversation` make the texts.
        tokenizer: of the model.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(self, task: Any, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    @property
    def stop_tokens(self) -> list[int]:
        """The end of a sequence."""
        return [self.tokenizer.eos_token_id]

    def prompt(self, conversation: Conversation) -> list[int]:
        """See `ChatFormat.prompt`.

        Raises:
            ConfigError: if there is a system text.
        """
        if conversation.system:
            raise ConfigError(
                f"the task {self.task.name!r} was trained without a place for a system text. Leave --system out."
            )
        *earlier, last = conversation.rounds
        turns = [(each.asked, each.answer) for each in earlier]
        format = self.task.format_conversation(turns, last.asked) if turns else None
        return self.task.encode_prompt(self.tokenizer, format or self.task.format_prompt(last.question, last.input))


def check_system(format: ChatFormat, system: str) -> None:
    """Refuses a system text that there is no place for before a question is asked.

    Args:
        format: makes the prompts.
        system: may be empty.

    Raises:
        ConfigError: if there is no place for it.
    """
    if system:
        format.prompt(Conversation(rounds=(Round(question="?"),), system=system))


def cut_at(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    return min((text.partition(end)[0] for end in ends), key=len, default=text)
