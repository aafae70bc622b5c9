"""Conversations in one form, whatever their records look like.

`messages` (role and content, which may be a list of parts), ShareGPT's and LLaVA's `conversations` (from and value,
with images), and Alpaca's records with their `system` and `history`. Images belong to the conversation as a whole:
`<image>` marks are counted, and taken out of the text.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from zinit.data.images import Encoded, ImageSource, check_image, inside
from zinit.data.records import check_text, describe, each_record, plain_text, read_document, same_text, unused_fields
from zinit.data.tables import with_encoded_images
from zinit.data.vectors import read_vector
from zinit.errors import DataError
from zinit.files import is_file, is_folder

MARK = "<image>"
SENSES = ("image", "audio", "video", "vector")  # of a record one, which the encoder of the run takes
SHOWN = tuple(name for sense in SENSES for name in (sense, f"{sense}s"))
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
}
FORMS = {  # what a record's turns are under, and what else it may have
    "messages": (*SHOWN, "system", "category"),
    "conversations": (*SHOWN, "system", "category"),
    "instruction": ("input", "output", *SHOWN, "system", "history", "category"),
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """A question and its answer.

    Attributes:
        question: what the user says.
        answer: what the assistant answers; empty if that is to be found.
        input: further context of the question, as Alpaca's records have it.
    """

    question: str
    answer: str = ""
    input: str = ""

    @property
    def asked(self) -> str:
        """The question, with its input below."""
        return "\n\n".join(filter(None, (self.question, self.input)))


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Rounds in order.

    Attributes:
        rounds: at least one.
        system: what the assistant is told before them; may be empty.
        images: of the whole conversation, in order.
        category: kind of the conversation, by which figures are told apart; empty has none.
        source: number of the data source it is from.
        said: what experts say about the images; see `zinit.tasks.experts`.
    """

    rounds: tuple[Round, ...]
    system: str = ""
    images: tuple[ImageSource, ...] = ()
    category: str = ""
    source: int = 0
    said: tuple[tuple[str, str, str], ...] = ()

    def with_context(self, lines: str) -> Conversation:
        """The conversation with lines above the input of its last question."""
        *earlier, last = self.rounds
        return replace(self, rounds=(*earlier, replace(last, input="\n".join(filter(None, (lines, last.input))))))

    @property
    def prompt(self) -> tuple[str, ...]:
        """All texts before the last answer, by their words: what tells a prompt from another."""
        earlier = [text for each in self.rounds for text in (each.question, each.input, each.answer)]
        return same_text(self.system, *earlier[:-1])


class _Unusable(Exception):
    """Why a record is skipped: the end of a count's name."""


def read_conversations(
    source: str, *, counts: Counter[str], image_folder: str | Path | None = None, number: int = 0
) -> list[Conversation]:
    """The conversations of a file, a folder with one file, or a Hub id; see `zinit.data.records.read_records`.

    Args:
        source: of the records.
        counts: "read" counts records; "skipped_..." those that cannot be used, by reason;
            "cut_unanswered_question" those whose last question has no answer and is left out; "unused_field_..."
            fields that hold something and are not used.
        image_folder: what the paths of images are relative to; None is the file's own folder.
        number: of the source among several.

    Raises:
        DataError: if the source cannot be read, or a record is in none of the known forms; it names the record.
    """
    found: list[Conversation] = []
    name, folder, records = _open(source, image_folder)
    for where, record in records:
        counts["read"] += 1
        try:
            found.append(_conversation(record, where, folder, counts, number))
        except _Unusable as reason:
            counts[f"skipped_{reason}"] += 1
    if not counts["read"]:
        raise DataError(f"{name} holds no records.")
    return found


def read_questions(source: str, *, counts: Counter[str], image_folder: str | Path | None = None) -> list[Conversation]:
    """Conversations whose last answer is asked for, one for each record, in order.

    Records are as `read_conversations` takes them, or have a ``prompt``. An answer to the last question is left out.

    Args:
        source: of the records.
        counts: see `read_conversations`; "answer_left_out" counts such answers.
        image_folder: what the paths of images are relative to; None is the file's own folder.

    Raises:
        DataError: if the source cannot be read, or a record asks nothing; it names the record.
    """
    found: list[Conversation] = []
    name, folder, records = _open(source, image_folder)
    for where, record in records:
        try:
            found.append(_question(record, where, folder, counts))
        except _Unusable as reason:
            raise DataError(f"{where} asks nothing that can be answered: {str(reason).replace('_', ' ')}.") from reason
    if not found:
        raise DataError(f"{name} holds no records.")
    counts["read"] = len(found)
    return found


def _open(source: str, image_folder: str | Path | None) -> tuple[str, Path | None, Iterator[tuple[str, Any]]]:
    """The name of a source, the folder of its images, and its records, each with its place for messages."""
    records, name = read_document(source)
    if isinstance(records, dict | str):
        raise DataError(f"{name}: expected a JSON array of records; got {describe(records)}.")
    folder = Path(image_folder) if image_folder is not None else Path(name).parent if is_file(name) else None
    numbered = enumerate(each_record(with_encoded_images(records), name), start=1)
    return name, folder, ((f"{name}, record {number}", record) for number, record in numbered)


def _whole(record: Any) -> Any:
    """TRL's ``prompt`` and ``completion``, lists of messages or texts, as one of `FORMS`; others as they are."""
    if not isinstance(record, dict) or any(record.get(name) is not None for name in FORMS):
        return record
    prompt, completion = record.get("prompt"), record.get("completion")
    rest = {name: value for name, value in record.items() if name not in ("prompt", "completion")}
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return {**rest, "messages": [*prompt, *completion]}
    if isinstance(prompt, str) and isinstance(completion, str):
        return {**rest, "instruction": prompt, "output": completion}
    return record


def _question(record: Any, where: str, folder: Path | None, counts: Counter[str]) -> Conversation:
    record = _whole(record)
    form = next(
        (name for name in (*FORMS, "prompt") if isinstance(record, dict) and record.get(name) is not None), None
    )
    if form is None:
        has = f"it has {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else describe(record)
        raise DataError(f"{where}: expected one of the fields {', '.join(FORMS)} and prompt; {has}.")
    counts.update(unused_fields(record, (form, *FORMS.get(form, FORMS["messages"]))))
    images = _Images(record, folder, where)
    system = [_text(record, "system", where)]
    if form in ("instruction", "prompt"):
        counts["answer_left_out"] += bool(record.get("output"))
        rounds = _alpaca_rounds({**record, "instruction": record[form], "output": ""}, images, where)
    else:
        turns = list(_turns(record[form], form, where, images, counts))
        while turns and turns[0][0] == SYSTEM:
            system.append(turns.pop(0)[1])
        if turns and turns[-1][0] == ASSISTANT:
            turns.pop()
            counts["answer_left_out"] += 1
        rounds = _pair([*turns, (ASSISTANT, "")])
    told = "\n\n".join(filter(str.strip, system))
    return Conversation(rounds=tuple(rounds), system=told, images=images.all())


def from_alpaca(record: Mapping[str, str], *, number: int = 0) -> Conversation:
    """An Alpaca record without history as a conversation of one round."""
    only = Round(question=record["instruction"], input=record["input"], answer=record["output"])
    return Conversation(rounds=(only,), source=number)


def _conversation(record: Any, where: str, folder: Path | None, counts: Counter[str], number: int) -> Conversation:
    record = _whole(record)
    form = next((name for name in FORMS if isinstance(record, dict) and record.get(name) is not None), None)
    if form is None or (form == "instruction" and record.get("output") is None):
        has = f"it has {', '.join(map(str, record)) or 'none'}" if isinstance(record, dict) else describe(record)
        raise DataError(
            f"{where}: expected an object with the field messages (role and content), conversations (from and value), "
            f"instruction and output, or prompt and completion; {has}."
        )
    counts.update(unused_fields(record, (form, *FORMS[form])))
    system = [_text(record, "system", where)]
    images = _Images(record, folder, where)
    if form == "instruction":
        rounds = _alpaca_rounds(record, images, where)
    else:
        turns = list(_turns(record[form], form, where, images, counts))
        while turns and turns[0][0] == SYSTEM:
            system.append(turns.pop(0)[1])
        if turns and turns[-1][0] == USER and len(turns) > 1:
            turns.pop()
            counts["cut_unanswered_question"] += 1
        rounds = _pair(turns)
    if not all(each.answer.strip() for each in rounds):
        raise _Unusable("empty_answer")
    return Conversation(
        rounds=tuple(rounds),
        system="\n\n".join(filter(str.strip, system)),
        images=images.all(),
        category=_text(record, "category", where).strip(),
        source=number,
    )


def _pair(turns: list[tuple[str, str]]) -> list[Round]:
    """Rounds of turns that alternate, the user's first."""
    roles = [role for role, _ in turns]
    if ASSISTANT not in roles:
        raise _Unusable("no_answer")
    if roles != [USER, ASSISTANT] * (len(turns) // 2):
        raise _Unusable("roles_do_not_alternate")
    texts = [text for _, text in turns]
    return [Round(question=q, answer=a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def _alpaca_rounds(record: Mapping[str, Any], images: _Images, where: str) -> list[Round]:
    rounds, history = [], record.get("history")
    if history is not None and not isinstance(history, list | tuple) and str(history).strip():
        raise DataError(f"{where}: the field 'history' must be a list of [asked, answered]; got {describe(history)}.")
    for pair in history or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{where}: 'history' must hold pairs of texts, [asked, answered]; got {describe(pair)}.")
        asked, answered = (check_text(text, "history", where) for text in pair)
        rounds.append(Round(question=images.take(asked), answer=answered))
    texts = (_text(record, name, where) for name in ("instruction", "input", "output"))
    question, input, answer = next(texts), next(texts), next(texts)
    return [*rounds, Round(question=images.take(question), input=images.take(input, may_be_empty=True), answer=answer)]


def _turns(turns: Any, form: str, where: str, images: _Images, counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """(role, text) of each turn."""
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: the field {form!r} must be a list of turns; got {describe(turns)}.")
    unused: set[str] = set()
    for turn in turns:
        role_key, text_key = ("role", "content") if turn.get("role") is not None else ("from", "value")
        role, content = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str):
            raise DataError(f"{where}: a turn needs role and content, or from and value; got {describe(turn)}.")
        unused.update(unused_fields(turn, (role_key, text_key), within=form))
        known = ROLES.get(role.strip().lower())
        if known is None:
            counts.update(unused)
            raise _Unusable("unknown_role")
        if content is None and known == ASSISTANT:
            content = ""
        yield known, _content(content, known, where, images)
    counts.update(unused)


def _content(content: Any, role: str, where: str, images: _Images) -> str:
    """The text of a turn, which may be in parts; its images are taken note of."""
    if isinstance(content, str):
        text = check_text(content, "content", where)
        return images.take(text) if role == USER else text
    if not isinstance(content, list | tuple) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{where}: the content of a turn must be text or a list of parts; got {describe(content)}.")
    texts = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(check_text(part["text"], "content", where))
        elif kind in ("image_url", *SENSES) and role == USER:
            images.add(part)
        else:
            raise _Unusable("unknown_content")
    text = "".join(texts)
    if role == USER and not text.strip() and all(part.get("type") == "text" for part in content):
        raise _Unusable("empty_question")
    return text


class _Images:
    """The images of a record, in the order in which its turns name them; or its sounds, videos, or ready features.

    Args:
        record: with the columns of `SHOWN`.
        folder: what paths are relative to; None allows no paths.
        where: for messages.
    """

    def __init__(self, record: Mapping[str, Any], folder: Path | None, where: str) -> None:
        self.folder, self.where = folder, where
        self.senses: set[str] = set()
        self.given: list[Any] = []
        for name in SHOWN:
            value = record.get(name)
            values = [
                each for each in (value if isinstance(value, list | tuple) else [value]) if each not in (None, "")
            ]
            self.given += values
            self.senses |= {name.removesuffix("s")} if values else set()
        self.marks = "|".join({MARK, *(f"<{sense}>" for sense in self.senses)})
        self.named: list[Any] = []  # one for each mark; None is the next of those given

    def take(self, text: str, *, may_be_empty: bool = False) -> str:
        """A text without its marks, each of which is one image."""
        pieces = re.split(self.marks, text)
        self.named += [None] * (len(pieces) - 1)
        if len(pieces) == 1:
            if not text.strip() and not may_be_empty:
                raise _Unusable("empty_question")
            return text
        return "".join(pieces).strip()

    def add(self, part: Mapping[str, Any]) -> None:
        """An image that is a part of a turn: with its own file or content, or a mark for one of the record's."""
        names = (*SENSES, "path", "url", "image_url")
        own = next((part[name] for name in names if part.get(name) is not None), None)
        self.named.append(own.get("url") if isinstance(own, dict) and "url" in own else own)
        self.senses.add(part["type"].removesuffix("_url"))

    def all(self) -> tuple[ImageSource, ...]:
        """All images, in order."""
        if sum(value is None for value in self.named) != len(self.given):
            raise _Unusable("wrong_number_of_images")
        if len(self.senses) > 1:
            raise _Unusable("several_senses")
        given, (sense,) = iter(self.given), self.senses or {SENSES[0]}
        found = tuple(self._one(next(given) if value is None else value, sense) for value in self.named)
        for image in found:
            try:
                if sense == "vector":
                    read_vector(image)
                elif sense == "image" and not isinstance(image, Image.Image):
                    check_image(image)
            except DataError as error:
                raise _Unusable(f"unreadable_{sense}") from error
        return found

    def _one(self, value: Any, sense: str) -> ImageSource:
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, str):
            return self._data(value) if value.startswith("data:") and sense == "image" else self._file(value, sense)
        content = value.get("bytes") if isinstance(value, dict) else None
        if isinstance(content, bytes) and content and sense == "image":
            return Encoded(self.where, partial(bytes, content))
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return self._file(value["path"], sense)
        how = "an image must be a path, or hold its content" if sense == "image" else f"{sense} must be a path"
        raise DataError(f"{self.where}: {how}; got {describe(value)}.")

    def _file(self, path: str, sense: str) -> Path:
        if self.folder is None or "://" in path:
            raise _Unusable(f"missing_{sense}")
        file = inside(self.folder, path)
        if not is_file(file) and not (sense == "video" and is_folder(file)):  # a folder of frames
            raise _Unusable(f"missing_{sense}")
        return file

    def _data(self, address: str) -> Encoded:
        try:
            content = base64.b64decode(address.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{self.where}: the address of an image holds no base64: {error}.") from error
        return Encoded(self.where, partial(bytes, content))


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    text = "" if value is None else plain_text(value)
    if text is None:
        raise DataError(f"{where}: the field {field!r} must be text; got {describe(value)}.")
    return check_text(text, field, where)
