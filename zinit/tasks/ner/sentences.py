"""Sentences with a tag for each token: CoNLL's columns and records, read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinit.data.records import SUFFIXES, describe, read_document, read_text
from zinit.errors import DataError

DOCUMENT = "-DOCSTART-"
TAG = re.compile(r"O|[BIES]-.+")


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
    source: str, *, columns: tuple[int, int], fields: tuple[str, ...], labels: Sequence[str] | None
) -> tuple[list[Sentence], int]:
    """The sentences of a file in columns, of a JSON, JSON lines or Parquet file, or of a Hub id.

    Args:
        source: path, or Hub id (its ``train`` split; ``id:split`` names another). A file without one of the suffixes
            .json, .jsonl and .parquet is one in columns: a token per line, blank lines between sentences.
        columns: which hold the token and the tag; negative ones count from the last.
        fields: what records call the list of tokens and the list of tags.
        labels: the names that tags given as numbers stand for, unless the data itself names them.

    Returns:
        The sentences, and how many records held none.

    Raises:
        DataError: naming file, line or record, and what is wrong.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in SUFFIXES:
        read = list(_from_columns(path, columns))
    else:
        document, name = read_document(source)
        read = list(_from_records(document, name, fields, labels))
    found = [sentence for sentence in read if sentence.tokens]
    if not found:
        raise DataError(f"{source} holds no sentences.")
    return found, len(read) - len(found)


def _from_columns(path: Path, columns: tuple[int, int]) -> Iterator[Sentence]:
    words: list[tuple[str, str]] = []
    begin, width = 0, None
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        cells = re.split(r"[ \t]+", line.strip(" \t\r"))
        if cells == [""]:
            if words:
                yield _sentence([token for token, _ in words], [tag for _, tag in words], f"{path}, line {begin}")
            words = []
            continue
        if cells[0] == DOCUMENT:
            continue
        width = width or len(cells)
        where = f"{path}, line {number}"
        if len(cells) != width:
            raise DataError(f"{where} has {len(cells)} columns, those before it have {width}: {line.strip()[:60]!r}.")
        if width < 2 or not all(-width <= column < width for column in columns):
            raise DataError(
                f"{where} has {width} columns: {line.strip()[:60]!r}. Expected a token in column {columns[0]} and a "
                f"tag in column {columns[1]} (the first is 0, the last is -1): -o task.token_column=N "
                f"-o task.tag_column=N."
            )
        begin = begin if words else number
        words.append((cells[columns[0]], cells[columns[1]]))


def _from_records(
    document: Any, name: str, fields: tuple[str, ...], labels: Sequence[str] | None
) -> Iterator[Sentence]:
    if isinstance(document, dict | str) or not hasattr(document, "__iter__"):
        raise DataError(f"{name}: expected a list of records with {' and '.join(fields)}; got {describe(document)}.")
    named = _names(document, fields[1])
    labels = named or labels
    for number, record in enumerate(document, start=1):
        where = f"{name}, record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with {' and '.join(fields)}; got {describe(record)}.")
        for field in fields:
            if field not in record:
                raise DataError(
                    f"{where} has no field {field!r}; it has {', '.join(map(str, record)) or 'none'}. If the data "
                    f"calls its fields otherwise: -o task.fields=TOKENS,TAGS."
                )
            if not isinstance(record[field], list):
                raise DataError(f"{where}: the field {field!r} must be a list; got {describe(record[field])}.")
        tokens, tags = (record[field] for field in fields)
        bad = next((token for token in tokens if not isinstance(token, str) or not token.strip()), None)
        if bad is not None:
            raise DataError(f"{where}: a token must be text that is not blank; got {describe(bad)}.")
        if len(tokens) != len(tags):
            raise DataError(f"{where} has {len(tokens)} tokens, but {len(tags)} tags.")
        yield _sentence(tokens, [_tag(tag, labels, where) for tag in tags], where)


def _names(document: Any, field: str) -> list[str] | None:
    """What a data set of the Hub or a Parquet file made from one says its numbers stand for."""
    feature = getattr(document, "features", {}).get(field)
    return getattr(getattr(feature, "feature", None), "names", None)


def _tag(tag: Any, labels: Sequence[str] | None, where: str) -> str:
    if isinstance(tag, str):
        return tag
    if isinstance(tag, bool) or not isinstance(tag, int):
        raise DataError(f"{where}: a tag must be text or a number; got {describe(tag)}.")
    if labels is None:
        raise DataError(
            f"{where}: the tags are numbers, and the data does not name them. Give the names in order: "
            f"-o task.labels=O,B-PER,I-PER,..."
        )
    if not 0 <= tag < len(labels):
        raise DataError(f"{where}: the tag {tag} has no name; there are {len(labels)}: {', '.join(labels)}.")
    return labels[tag]


def _sentence(tokens: list[str], tags: list[str], where: str) -> Sentence:
    for token, tag in zip(tokens, tags, strict=True):
        if not TAG.fullmatch(tag):
            raise DataError(
                f"{where}: the tag {tag!r} of the token {token!r} is none of O, B-X and I-X (or E-X, S-X). If tags are "
                f"in another column or field, name it: -o task.tag_column=N, or -o task.fields=TOKENS,TAGS."
            )
    return Sentence(tokens=tuple(tokens), tags=tuple(tags), where=where)
