"""How a conversation is written for a model: by the tokenizer's own chat template, or by one of those known here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from zinit.data.conversations import ASSISTANT, SYSTEM, USER, Conversation, Round
from zinit.errors import ConfigError, first_line
from zinit.tasks.alpaca.template import HEADER, REQUEST
from zinit.tasks.conversation.registry import AUTO, OWN, TEMPLATES

Piece = str | int  # a text, or one special token

# What chat templates take for today, so that a text is the same tokens every day.
DAY = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
TODAY = "".join(f" | replace({format!r}, {value!r})" for format, value in DAY.items())
SAME_DAY = f"{{%- macro strftime_now(format) -%}}{{{{ format{TODAY} }}}}{{%- endmacro -%}}"


class Written(NamedTuple):
    """One answer that is learned.

    Attributes:
        before: what stands before the answer, since the end of the last one.
        answer: the answer, and what ends it; empty if it is asked for.
    """

    before: list[Piece]
    answer: list[Piece]


class Template(ABC):
    """A way to write conversations.

    Args:
        tokenizer: of the model.
        system: what the assistant is told where a conversation does not say; None is the template's own.

    Attributes:
        in_place: whether texts are encoded behind the special token before them, as chat templates are; else each by
            itself.
        stops: texts that end an answer, where no single token does.
    """

    in_place = False
    stops: tuple[str, ...] = ()

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system

    @property
    def stop_tokens(self) -> list[int]:
        """Tokens that end an answer; the first is the tokenizer's own."""
        return [self.tokenizer.eos_token_id]

    @abstractmethod
    def write(self, conversation: Conversation, *, ask: bool = False) -> list[Written]:
        """The learned answers of a conversation in order, each with what stands before it.

        Args:
            conversation: to write.
            ask: whether the last answer is left out.
        """


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The texts of a template without special tokens.

    Attributes:
        told: what the assistant is told if nobody says otherwise.
        opening: before the first question; {system}.
        question: {question}, and all up to the answer.
        answer: {answer}.
        end: text that ends an answer; empty is the end-of-sequence token.
    """

    told: str
    opening: str
    question: str
    answer: str
    end: str = ""


class TextTemplate(Template):
    """One of words. Its texts are stripped, so that nothing but the template stands at a border."""

    wording: Wording

    @property
    def stops(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.wording.end,) if self.wording.end else ()

    def write(self, conversation: Conversation, *, ask: bool = False) -> list[Written]:
        """See `Template.write`."""
        end: Piece = self.wording.end or self.tokenizer.eos_token_id
        written = []
        for number, each in enumerate(conversation.rounds):
            before = self.ask(each) if number else self.open(conversation) + self.ask(each)
            start: list[Piece] = [] if number or self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            written.append(Written([*start, before], [*self.reply(each), end]))
        return _without_last_answer(written) if ask else written

    def open(self, conversation: Conversation) -> str:
        """What stands before the first question."""
        told = self.wording.told if self.system is None else self.system
        return self.wording.opening.replace("{system}", conversation.system.strip() or told)

    def ask(self, each: Round) -> str:
        """A question, and all up to its answer."""
        return self.wording.question.replace("{question}", each.asked.strip())

    def reply(self, each: Round) -> list[Piece]:
        """An answer."""
        return [self.wording.answer.replace("{answer}", each.answer.strip())]


def _without_last_answer(written: list[Written]) -> list[Written]:
    return [*written[:-1], Written(written[-1].before, [])]


class Vicuna(TextTemplate):
    """Vicuna's, version 1.1: USER and ASSISTANT, every answer ended by the end-of-sequence token."""

    wording = Wording(
        told="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        opening="{system} ",
        question="USER: {question} ASSISTANT:",
        answer=" {answer}",
    )


class Chat65B(TextTemplate):
    """That of LLaMA-Adapter V2's chat model with 65 billion parameters: Human and Assistant between ###."""

    wording = Wording(
        told="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        opening="{system}###",
        question="Human: {question}###Assistant:",
        answer=" {answer}",
        end="###",
    )


class Alpaca(TextTemplate):
    """Alpaca's: for one round its own two, for several a section for each; answers as they stand.

    A system text stands in place of the header.
    """

    wording = Wording(told="", opening="", question="", answer="{answer}")

    def open(self, conversation: Conversation) -> str:
        """The header is that of the first question."""
        told = conversation.system.strip() or (self.system or "")
        context = ", paired with an input that provides further context" if conversation.rounds[0].input.strip() else ""
        return told or f"{HEADER}{context}. {REQUEST}"

    def ask(self, each: Round) -> str:
        """See `zinit.tasks.alpaca.template`."""
        input = f"### Input:\n{each.input}\n\n" if each.input.strip() else ""
        return f"\n\n### Instruction:\n{each.question}\n\n{input}### Response:"

    def reply(self, each: Round) -> list[Piece]:
        """As it stands."""
        return [each.answer]


class Skeleton(NamedTuple):
    """What a chat template makes of a number of rounds: texts with `_mark`s in place of what is said.

    Attributes:
        prompts: up to each learned answer; the last is up to the last answer.
        ends: up to the end of each learned answer.
    """

    prompts: list[str]
    ends: list[str]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


SYSTEM_MARK = _mark(0)
MARKS = re.compile("\ue000([0-9]+)\ue001")


class Tokenizers(Template):
    """The tokenizer's own chat template. What is said is stripped of white space around it.

    A template without a place for a system text gets it before the first question. One that writes earlier answers
    differently once another question follows teaches the last answer alone.
    """

    in_place = True

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        super().__init__(tokenizer, system)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{type(tokenizer).__name__} has no chat template. Take one of {', '.join(TEXT_TEMPLATES)}: "
                f"-o task.template=vicuna."
            )
        template = tokenizer.get_chat_template()
        self._template = SAME_DAY + template if "strftime_now" in template else template
        self._skeletons: dict[tuple[int, bool], Skeleton] = {}
        specials = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)) or "(?!)")

    def write(self, conversation: Conversation, *, ask: bool = False) -> list[Written]:
        """See `Template.write`."""
        system = conversation.system.strip() or (self.system or "").strip()
        skeleton = self._skeleton(len(conversation.rounds), bool(system))
        texts = [system]
        for each in conversation.rounds:
            texts += [each.asked.strip(), each.answer.strip()]
        written, start = [], 0
        for prompt, end in zip(skeleton.prompts, skeleton.ends, strict=True):
            answer = self._pieces(end[len(prompt) :], texts) or [self.tokenizer.eos_token_id]
            written.append(Written(self._pieces(prompt[start:], texts), answer))
            start = len(end)
        return _without_last_answer(written) if ask else written

    @cached_property
    def stop_tokens(self) -> list[int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokenizer's end of sequence, and what the template ends an answer with."""
        end = self.write(Conversation(rounds=(Round(question="a", answer="b"),)))[-1].answer[-1]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *([end] if isinstance(end, int) else [])]))

    @cached_property
    def stops(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The text that ends an answer, where no token does."""
        *_, last = self.write(Conversation(rounds=(Round(question="a", answer="b"),)))[-1].answer
        end = last.removeprefix("b").strip() if isinstance(last, str) else ""
        return (end,) if end else ()

    def _pieces(self, text: str, texts: Sequence[str]) -> list[Piece]:
        """A part of a skeleton with what is said in its place; special tokens are those of the template alone."""
        pieces: list[Piece] = []

        def add(more: str) -> None:
            if pieces and isinstance(pieces[-1], str):
                pieces[-1] += more
            elif more:
                pieces.append(more)

        for number, part in enumerate(MARKS.split(text)):
            if number % 2:
                add(texts[int(part)])
                continue
            start = 0
            for found in self._specials.finditer(part):
                add(part[start : found.start()])
                pieces.append(self.tokenizer.convert_tokens_to_ids(found.group()))
                start = found.end()
            add(part[start:])
        return pieces

    def _skeleton(self, rounds: int, has_system: bool) -> Skeleton:
        for count in range(1, rounds + 1):  # each begins with the one before it
            if (count, has_system) not in self._skeletons:
                self._skeletons[count, has_system] = self._make(count, has_system)
        return self._skeletons[rounds, has_system]

    def _make(self, rounds: int, has_system: bool) -> Skeleton:
        """The template's text up to every answer and up to its end, as far as the later ones begin with the earlier."""
        prompt = self._render(rounds, has_system, ask=True)
        full = self._render(rounds, has_system)
        if not full.startswith(prompt):
            raise ConfigError(
                "the tokenizer's chat template asks for an answer in other words than it writes one with. Take "
                f"another template: -o task.template={' or '.join(TEXT_TEMPLATES)}."
            )
        given = {_mark(number) for number in range(0 if has_system else 1, 2 * rounds + 1)}
        if lost := given - {found.group() for found in MARKS.finditer(full)}:
            raise ConfigError(
                f"the tokenizer's chat template leaves out {len(lost)} of {2 * rounds + has_system} texts of a "
                f"conversation. Take another template: -o task.template={' or '.join(TEXT_TEMPLATES)}."
            )
        end = self._end(full, len(prompt), _mark(2 * rounds))
        if rounds > 1:
            earlier = self._skeletons[rounds - 1, has_system]
            if len(earlier.ends) == rounds - 1 and prompt.startswith(earlier.ends[-1]):
                return Skeleton([*earlier.prompts, prompt], [*earlier.ends, end])
        return Skeleton([prompt], [end])

    def _end(self, full: str, prompt: int, answer: str) -> str:
        """The text up to the end of the last answer: the first special token behind it, or all there is."""
        start = full.index(answer, prompt) + len(answer)
        found = self._specials.search(full, start)
        return full[: found.end()] if found else full

    def _render(self, rounds: int, has_system: bool, *, ask: bool = False) -> str:
        turns = [{"role": (ASSISTANT, USER)[n % 2], "content": _mark(n)} for n in range(1, 2 * rounds + (not ask))]
        if not has_system:
            return self._fill(turns, ask)
        try:
            found = self._fill([{"role": SYSTEM, "content": SYSTEM_MARK}, *turns], ask)
        except ConfigError:
            found = ""
        if SYSTEM_MARK in found:
            return found
        first, *rest = turns  # no place of its own
        return self._fill([{**first, "content": f"{SYSTEM_MARK}\n\n{first['content']}"}, *rest], ask)

    def _fill(self, turns: list[dict[str, str]], ask: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=ask, **SETTINGS
            )
        except Exception as error:  # jinja's own kinds, and whatever a template raises
            raise ConfigError(
                f"the tokenizer's chat template cannot be used: {first_line(error)} Take another template: "
                f"-o task.template={' or '.join(TEXT_TEMPLATES)}."
            ) from error


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts that a tokenizer takes for special tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in (*tokenizer.all_special_tokens, *added) if token}


TEXT_TEMPLATES = ("vicuna", "alpaca", "chat65b")


def make_template(name: str, tokenizer: Any, system: str | None = None) -> Template:
    """A template by its name; "auto" is the tokenizer's own where there is one, and Vicuna's where not.

    Raises:
        ConfigError: if there is no such template, or the tokenizer's own cannot be used.
    """
    if name == AUTO:
        name = OWN if tokenizer.chat_template else "vicuna"
    return TEMPLATES.get(name)(tokenizer, system)
