"""Questions of extractive question answering: the official SQuAD format and flat records, read strictly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zinit.data.records import (
    SUFFIXES,
    check_text,
    describe,
    each_record,
    read_document,
    unused_fields,
    whole_number,
)
from zinit.errors import DataError
from zinit.files import is_folder, local_path, parsing

OF_QUESTION = ("id", "question", "answers", "is_impossible")
OF_ANSWER = ("text", "answer_start")
SKIP = "Correct it, or leave such questions out: -o task.on_bad=skip."


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one text.

    Attributes:
        id: unique among all questions.
        text: the question.
        context: the text the answer is a part of.
        answers: the expected answers; none if there is no answer.
        starts: where each of them begins in the context, in characters.
        blind: whether the data does not say what is expected, as in a test set.
    """

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    blind: bool = False


class _BadQuestionError(DataError):
    """One question is wrong in a way that leaves the others as they are."""


def read_questions(
    source: str,
    *,
    skip_bad: bool = False,
    blind: bool = False,
    seen: dict[str, str] | None = None,
    unused: Counter[str] | None = None,
) -> tuple[list[Question], int]:
    """The questions of a JSON, JSON lines, CSV or Parquet file, of a folder with one such file, or of a Hub id.

    Args:
        source: path, or Hub id such as ``rajpurkar/squad_v2`` (its ``train`` split; ``id:split`` names another).
        skip_bad: leave out questions whose answers are not where the data says, or whose id another question has too,
            instead of refusing them.
        blind: allow data in which no question has a field ``answers``.
        seen: {id: where} of the questions of other sources, which is added to: ids are unique among all.
        unused: counts the articles, paragraphs and questions in which a field that is not read holds something.

    Returns:
        The questions, and how many were left out.

    Raises:
        DataError: naming file, paragraph and question.
    """
    document, name = read_document(source)
    return parse_questions(document, name, skip_bad=skip_bad, blind=blind, seen=seen, unused=unused)


def parse_questions(
    document: Any,
    name: str,
    *,
    skip_bad: bool = False,
    blind: bool = False,
    seen: dict[str, str] | None = None,
    unused: Counter[str] | None = None,
) -> tuple[list[Question], int]:
    """The questions of a document.

    Args:
        document: official SQuAD JSON, ``{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}``, or flat
            records ``{"id", "context", "question", "answers"}``, bare or under "data"; in a table ``answers`` is JSON.
        name: of the document, for messages.
        skip_bad: see `read_questions`.
        blind: likewise.
        seen: likewise.
        unused: likewise.

    Returns:
        See `read_questions`.

    Raises:
        DataError: see `read_questions`.
    """
    unused = Counter() if unused is None else unused
    if isinstance(document, dict):
        unused.update(unused_fields(document, ("data", "version")))
        document = _field(document, "data", list, name)
    elif isinstance(document, str) or not hasattr(document, "__iter__"):
        raise DataError(f"{name}: expected SQuAD's JSON, an object with the list 'data'; got {describe(document)}.")
    found: list[Question] = []
    seen = {} if seen is None else seen
    skipped, number = 0, len(seen)
    without: bool | None = None  # whether the first question has no answers, which is then so of all
    for where, context, record in _records(document, name, unused):
        identity = _identity(record, where)
        first = seen.setdefault(identity, where).removeprefix(f"{name}, ")
        repeated = len(seen) == number
        number = len(seen)
        where = f"{where}, question {identity!r}"
        try:
            if repeated:
                raise _BadQuestionError(f"{where}: its id is not unique, {first} has it too. {SKIP}")
            without = _is_blind(record) if without is None else without
            found.append(_question(record, identity, context, where, unused, blind=blind and without))
        except _BadQuestionError:
            if not skip_bad:
                raise
            skipped += 1
    if not found:
        left_out = f"; {skipped} were left out as bad" if skipped else ""
        raise DataError(f"{name} holds no questions{left_out}.")
    return found, skipped


def split_questions(questions: Sequence[Question], seed: int, name: str) -> tuple[list[Question], list[Question]]:
    """About nine tenths to train on and one tenth to hold out: all questions about a context are in the same part.

    Args:
        questions: all of them.
        seed: of the choice.
        name: of the data, for messages.

    Raises:
        DataError: if there is only one context.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))
    if len(contexts) < 2:
        raise DataError(
            f"{name} holds questions about one context only, so none can be held out. Give more data, or held-out "
            f"data of its own: -o task.held_out_data=FILE."
        )
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {contexts[index] for index in order[: max(1, len(contexts) // 10)]}
    training = [question for question in questions if question.context not in chosen]
    return training, [question for question in questions if question.context in chosen]


def train_and_dev(folder: str) -> tuple[str, str | None]:
    """The files of a folder to train on and to hold out: the ones named ``train*`` and ``dev*``.

    Args:
        folder: if it is none, or holds no such pair, it comes back alone.

    Raises:
        DataError: if there are several of a kind.
    """
    path = local_path(folder)
    if not is_folder(path):
        return folder, None
    found = []
    for start in ("train", "dev"):  # no hidden file starts like this
        files = sorted(file for file in path.iterdir() if file.name.startswith(start) and file.suffix in SUFFIXES)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(
                f"{folder} holds several {start}* files: {names}. Name the ones to use: --data FILE -o "
                f"task.held_out_data=FILE."
            )
        found += map(str, files)
    return (found[0], found[1]) if len(found) == 2 else (folder, None)


def _records(document: Any, name: str, unused: Counter[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(where, context, record) of every question; fields that are not read are counted."""
    for number, entry in enumerate(each_record(document, name), start=1):
        where = f"{name}, entry {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object; got {describe(entry)}.")
        if "paragraphs" not in entry:
            where = f"{name}, record {number}"
            if "context" not in entry:
                raise DataError(
                    f"{where}: expected either an article with 'paragraphs' or a question with 'context'; it has "
                    f"{', '.join(map(str, entry)) or 'nothing'}."
                )
            unused.update(unused_fields(entry, ("context", *OF_QUESTION)))
            yield where, _context(entry, where), entry
            continue
        unused.update(unused_fields(entry, ("title", "paragraphs")))
        title = entry.get("title")
        article = f"{title!r}" if isinstance(title, str) else f"article {number}"
        for index, paragraph in enumerate(_field(entry, "paragraphs", list, where), start=1):
            where = f"{name}, paragraph {index} of {article}"
            if not isinstance(paragraph, dict):
                raise DataError(f"{where}: expected an object; got {describe(paragraph)}.")
            unused.update(unused_fields(paragraph, ("context", "qas"), within="paragraphs"))
            context = _context(paragraph, where)
            for place, record in enumerate(_field(paragraph, "qas", list, where), start=1):
                if not isinstance(record, dict):
                    raise DataError(f"{where}, question {place}: expected an object; got {describe(record)}.")
                unused.update(unused_fields(record, OF_QUESTION, within="qas"))
                yield where, context, record


def _is_blind(record: dict[str, Any]) -> bool:
    return record.get("answers") is None and record.get("is_impossible") is None


def _question(
    record: dict[str, Any], identity: str, context: str, where: str, unused: Counter[str], *, blind: bool
) -> Question:
    text = _text(record, "question", where).strip()  # a tokenizer may make tokens of blanks
    if blind:
        if not _is_blind(record):
            raise DataError(f"{where} has answers, but those before it have none. Give all answers, or none.")
        return Question(id=identity, text=text, context=context, answers=(), starts=(), blind=True)
    answers = list(_answers(record, where, unused))
    impossible = _truth(record.get("is_impossible"))
    if impossible is not None and not isinstance(impossible, bool):
        raise DataError(f"{where}: 'is_impossible' must be true or false; got {describe(impossible)}.")
    if impossible and answers:
        raise _BadQuestionError(f"{where} is marked as impossible, but has the answer {answers[0][0]!r}. {SKIP}")
    for answer, start in answers:
        _check(answer, start, context, where)
    return Question(
        id=identity,
        text=text,
        context=context,
        answers=tuple(answer for answer, _ in answers),
        starts=tuple(start for _, start in answers),
    )


def _answers(record: dict[str, Any], where: str, unused: Counter[str]) -> Iterator[tuple[str, int]]:
    """(text, start) of each answer: a list of objects (official), or an object of two lists (flat records)."""
    answers = record.get("answers")
    if "answers" not in record and _truth(record.get("is_impossible")) is True:
        return
    if isinstance(answers, str) and answers.strip():  # in a table
        with parsing(f"{where}: expected a list of answers; got {describe(answers)}, which is no JSON", DataError):
            answers = json.loads(answers)
    elif isinstance(answers, str):
        answers = []
    found = [answer for answer in (answers if isinstance(answers, list) else [answers]) if isinstance(answer, dict)]
    unused.update(sorted({name for answer in found for name in unused_fields(answer, OF_ANSWER, within="answers")}))
    if isinstance(answers, dict):
        texts, starts = _field(answers, "text", list, where), _field(answers, "answer_start", list, where)
        if len(texts) != len(starts):
            raise DataError(f"{where} has {len(texts)} answer texts, but {len(starts)} of answer_start.")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list):
        missing = "answers" not in record
        got = f"there is no field 'answers'; it has {', '.join(record)}" if missing else f"got {describe(answers)}"
        raise DataError(f"{where}: expected a list of answers (empty if there is none); {got}.")
    for answer in answers:
        if not isinstance(answer, dict):
            raise DataError(f"{where}: an answer must be an object with text and answer_start; got {describe(answer)}.")
        start = whole_number(answer.get("answer_start"))
        if start is None:
            got = describe(answer.get("answer_start"))
            raise DataError(f"{where}: 'answer_start' must be a whole number; got {got}.")
        yield _text(answer, "text", where), start


def _check(answer: str, start: int, context: str, where: str) -> None:
    """An answer stands where the data says it does."""
    if not answer.strip():
        raise _BadQuestionError(f"{where} has an answer without text ({answer!r}). {SKIP}")
    if start >= 0 and context.startswith(answer, start):
        return
    if 0 <= start < len(context):
        there = f"{context[start : start + len(answer)]!r} is there"
    else:
        there = f"the context has {len(context)} characters"
    places = [index for index in range(len(context)) if context.startswith(answer, index)]
    elsewhere = f"It occurs at {', '.join(map(str, places[:5]))}" if places else "It occurs nowhere in the context"
    raise _BadQuestionError(
        f"{where}: the answer {answer!r} is not at answer_start {start}: {there}. {elsewhere}. {SKIP}"
    )


def _context(record: dict[str, Any], where: str) -> str:
    context = _text(record, "context", where)
    if not context.strip():
        raise DataError(f"{where}: the context is empty.")
    return context


def _identity(record: dict[str, Any], where: str) -> str:
    """The id; a whole number is taken as the text that stands for it."""
    number = whole_number(record.get("id"))
    return _text(record, "id", where) if number is None else str(number)


def _truth(value: Any) -> Any:
    """True or False; in a table they are words."""
    return (
        {"true": True, "false": False, "": None}.get(value.strip().lower(), value) if isinstance(value, str) else value
    )


def _text(record: dict[str, Any], field: str, where: str) -> str:
    return check_text(_field(record, field, str, where), field, where)


def _field(record: dict[str, Any], field: str, kind: type, where: str) -> Any:
    if field not in record:
        raise DataError(f"{where} has no field {field!r}; it has {', '.join(map(str, record)) or 'none'}.")
    if not isinstance(record[field], kind):
        expected = {str: "text", list: "a list"}[kind]
        raise DataError(f"{where}: the field {field!r} must be {expected}; got {describe(record[field])}.")
    return record[field]
