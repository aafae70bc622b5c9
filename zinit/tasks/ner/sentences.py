"""Sentences with a tag for each token: CoNLL's columns and records, read strictly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinit.data.records import (
    SUFFIXES,
    check_text,
    describe,
    each_record,
    plain_text,
    read_document,
    read_text,
    unused_fields,
    whole_number,
)
from zinit.errors import DataError
from zinit.files import is_file, local_path

DOCUMENT = "-DOCSTART-"
TAG = re.compile(r"O|[BIES]-.+")
COMMENTS = ("# ", "#begin document", "#end document")  # how lines of CoNLL's files start that are no tokens
BILOU = {"L-": "E-", "U-": "S-"}  # the last token and the only one, under the names that are used here


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence.

    Attributes:
        tokens: its words.
        tags: one for each.
        where: file and line or record, for messages.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    where: str


def read_sentences(
    source: str,
    *,
    columns: tuple[int, int],
    fields: tuple[str, ...],
    labels: Sequence[str] | None,
    skipped: Counter[str] | None = None,
    unused: Counter[str] | None = None,
) -> tuple[list[Sentence], int]:
    """The sentences of a file in columns, of a JSON, JSON lines, CSV or Parquet file, or of a Hub id.

    Args:
        source: path, or Hub id (its ``train`` split; ``id:split`` names another). A file without one of the suffixes
            .json, .jsonl, .csv and .parquet is one in columns: a token per line, blank lines between sentences.
        columns: which hold the token and the tag; negative ones count from the last.
        fields: what records call the list of tokens and the list of tags.
        labels: the names that tags given as numbers stand for, unless the data itself names them.
        skipped: counts the lines of comments.
        unused: counts the records, or the lines with a token, in which a further field or column holds something.

    Returns:
        The sentences, and how many records held none.

    Raises:
        DataError: naming file, line or record, and what is wrong.
    """
    path = local_path(source)
    skipped, unused = Counter() if skipped is None else skipped, Counter() if unused is None else unused
    if is_file(path) and path.suffix not in SUFFIXES:
        read = list(_from_columns(path, columns, skipped, unused))
    else:
        document, name = read_document(source)
        read = list(_from_records(document, name, fields, labels, unused))
    found = [sentence for sentence in read if sentence.tokens]
    if not found:
        raise DataError(f"{source} holds no sentences.")
    return found, len(read) - len(found)


def _from_columns(
    path: Path, columns: tuple[int, int], skipped: Counter[str], unused: Counter[str]
) -> Iterator[Sentence]:
    words: list[tuple[str, str]] = []
    begin, width, first = 0, 0, 0
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        cells = re.split(r"[ \t]+", line.strip(" \t\r"))
        if cells == [""]:
            if words:
                yield _sentence([token for token, _ in words], [tag for _, tag in words], f"{path}, line {begin}")
            words = []
            continue
        if cells[0] == DOCUMENT:
            continue
        if f"{line.strip()} ".startswith(COMMENTS) and not _ends_in_tag(cells, columns[1]):
            skipped["skipped_comments"] += 1
            continue
        width, first = width or len(cells), first or number
        where = f"{path}, line {number}"
        if len(cells) != width:
            raise DataError(
                f"{where} has {len(cells)} columns, those before it have {width}: "
                f"{line.strip()[:60]!r}. They begin in line {first}; correct the one that is wrong (comments: '# ...')."
            )
        if width < 2 or not all(-width <= column < width for column in columns):
            raise DataError(
                f"{where} has {width} columns: {line.strip()[:60]!r}. Expected a token in column {columns[0]} and a "
                f"tag in column {columns[1]} (the first is 0, the last is -1): -o task.token_column=N "
                f"-o task.tag_column=N."
            )
        used = {column % width for column in columns}
        unused.update(f"unused_field_column_{index}" for index in range(width) if index not in used)
        begin = begin if words else number
        words.append((cells[columns[0]], cells[columns[1]]))


def _ends_in_tag(cells: list[str], column: int) -> bool:
    """Whether a line holds a tag where one belongs: "#" is a token too."""
    return -len(cells) <= column < len(cells) and TAG.fullmatch(plain_tag(cells[column])) is not None


def _from_records(
    document: Any, name: str, fields: tuple[str, ...], labels: Sequence[str] | None, unused: Counter[str]
) -> Iterator[Sentence]:
    if isinstance(document, dict | str) or not hasattr(document, "__iter__"):
        raise DataError(f"{name}: expected a list of records with {' and '.join(fields)}; got {describe(document)}.")
    named = _names(document, fields[1])
    labels = named or labels
    for number, record in enumerate(each_record(document, name), start=1):
        where = f"{name}, record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with {' and '.join(fields)}; got {describe(record)}.")
        for field in fields:
            if field not in record:
                raise DataError(
                    f"{where} has no field {field!r}; it has {', '.join(map(str, record)) or 'none'}. If the data "
                    f"calls its fields otherwise: -o task.fields=TOKENS,TAGS."
                )
        unused.update(unused_fields(record, fields))
        tokens, tags = (record[field] for field in fields)
        if isinstance(tokens, str) and isinstance(tags, str):  # as tables have them
            tokens, tags = tokens.split(), tags.split()
        for field, value in zip(fields, (tokens, tags), strict=True):
            if not isinstance(value, list):
                raise DataError(f"{where}: the field {field!r} must be a list; got {describe(value)}.")
        tokens = [_token(token, fields[0], where) for token in tokens]
        if len(tokens) != len(tags):
            raise DataError(f"{where} has {len(tokens)} tokens, but {len(tags)} tags.")
        yield _sentence(tokens, [_tag(tag, labels, where) for tag in tags], where)


def _token(token: Any, field: str, where: str) -> str:
    text = plain_text(token)
    if text is None or not text.strip():
        raise DataError(f"{where}: a token must be text that is not blank; got {describe(token)}.")
    return check_text(text, field, where)


def _names(document: Any, field: str) -> list[str] | None:
    """What a data set of the Hub or a Parquet file made from one says its numbers stand for."""
    feature = getattr(document, "features", {}).get(field)
    return getattr(getattr(feature, "feature", None), "names", None)


def _tag(tag: Any, labels: Sequence[str] | None, where: str) -> str:
    if isinstance(tag, str):
        return tag
    number = whole_number(tag)
    if number is None:
        raise DataError(f"{where}: a tag must be text or a number; got {describe(tag)}.")
    if labels is None:
        raise DataError(
            f"{where}: the tags are numbers, and the data does not name them. Give the names in order: "
            f"-o task.labels=O,B-PER,I-PER,..."
        )
    if not 0 <= number < len(labels):
        raise DataError(f"{where}: the tag {number} has no name; there are {len(labels)}: {', '.join(labels)}.")
    return labels[number]


def plain_tag(tag: str) -> str:
    """A tag in the scheme that is used here: BILOU's L and U are E and S."""
    return BILOU.get(tag[:2], tag[:2]) + tag[2:]


def _sentence(tokens: list[str], tags: list[str], where: str) -> Sentence:
    tags = [plain_tag(tag) for tag in tags]
    for token, tag in zip(tokens, tags, strict=True):
        if not TAG.fullmatch(tag):
            raise DataError(
                f"{where}: the tag {tag!r} of the token {token!r} is none of O, B-X and I-X (or E-X, S-X; L-X, U-X). "
                f"If tags are in another column or field, name it: -o task.tag_column=N, or -o task.fields=TOKENS,TAGS."
            )
    return Sentence(tokens=tuple(tokens), tags=tuple(tags), where=where)
