"""Records from local files and the Hub, with errors that name file, record and field."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zinit.compat import packaged_datasets
from zinit.errors import DataError, first_line
from zinit.files import is_file, is_folder, is_hidden, is_lfs_pointer, local_path, parsing
from zinit.validation import shown

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
MOST_UNUSED = 20  # names of unused fields that a report lists


def read_records(
    source: str,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    renamed_by: str = "",
    unused: Counter[str] | None = None,
) -> list[dict[str, str]]:
    """Text records of a JSON array, JSON lines, CSV or Parquet file, of a folder with one such file, or of a Hub id.

    A number is taken as the text that stands for it.

    Args:
        source: path, or Hub id such as ``tatsu-lab/alpaca`` (its ``train`` split; ``id:split`` names another,
            ``id:configuration:split`` one of several configurations, such as ``openai/gsm8k:main:test``).
        required: fields that every record must have.
        optional: fields that are empty text where a record lacks them.
        renamed_by: the option that names the fields otherwise (``task.fields=a,b``), for messages; empty if none does.
        unused: counts the records in which a further field holds something; see `unused_fields`.

    Raises:
        DataError: if the source is missing, unreadable, empty or lacks a field; it names the record.
    """
    records, name = read_document(source)
    if isinstance(records, dict | str) or not isinstance(records, Iterable):
        raise DataError(f"{name}: expected a JSON array of records; got {describe(records)}.")
    found = []
    for index, record in enumerate(each_record(records, name)):
        found.append(_pick(record, index, name, required, optional, renamed_by))
        if unused is not None:
            unused.update(unused_fields(record, (*required, *optional)))
    if not found:
        raise DataError(f"{name} holds no records.")
    return found


def unused_fields(record: Mapping[Any, Any], used: Sequence[str], *, within: str = "") -> list[str]:
    """Names, for a report, of the fields of a record that hold something and are not used.

    Args:
        record: by field.
        used: the names of those that are.
        within: the field that the record is in, if it is a part of another.
    """
    start = f"unused_field_{within}." if within else "unused_field_"
    return [f"{start}{name}" for name, value in record.items() if name not in used and _has_content(value)]


def same_text(*texts: str) -> tuple[str, ...]:
    """Texts by their words: what differs in white space only is the same."""
    return tuple(" ".join(text.split()) for text in texts)


def count_sources(read: Sequence[Sequence[Any]]) -> dict[str, int]:
    """How many examples came from each of several sources, for a report; nothing for one."""
    return {f"read_source_{i}": len(found) for i, found in enumerate(read, start=1)} if len(read) > 1 else {}


def most_unused(unused: Counter[str]) -> dict[str, int]:
    """The most frequent unused fields, and how many others there are: a file may give every record its own."""
    report = dict(unused.most_common(MOST_UNUSED))
    return report | ({"unused_fields_more": len(unused) - len(report)} if len(unused) > len(report) else {})


def _has_content(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != [] and value != {}


def read_document(source: str) -> tuple[Any, str]:
    """What a source holds, whatever its structure, and its name for messages.

    Args:
        source: see `read_records`; JSON need not be an array here.

    Returns:
        The document of a JSON file, an iterable of the records of any other source; see `each_record`.

    Raises:
        DataError: if the source is missing, unreadable or empty.
    """
    path = local_path(source)
    if is_folder(path):
        path = _single_file(path)
    if is_file(path):
        return _read_file(path), str(path)
    if _looks_like_path(source):
        raise DataError(f"there is no data file {source}. Expected a {', '.join(SUFFIXES)} file or a Hub id.")
    return load_hub(source, split=hub_parts(source)[2] or "train"), source


def each_record(records: Iterable[Any], name: str) -> Iterator[Any]:
    """The records of a document; those of a Parquet file are made one after the other, which may fail.

    Raises:
        DataError: naming the source.
    """
    with parsing(f"{name}: a record cannot be read", DataError):
        for number, record in enumerate(records, start=1):
            if isinstance(record, dict) and (problem := row_problem(record)):
                raise DataError(f"{name}, record {number}: {problem}")
            yield record


def _pick(
    record: Any, index: int, name: str, required: Sequence[str], optional: Sequence[str], renamed_by: str
) -> dict[str, str]:
    where = f"{name}, record {index + 1}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with the fields {', '.join(required)}; got {describe(record)}.")
    picked = {}
    for field in (*required, *optional):
        value = record.get(field)
        if value is None and field in optional:
            value = ""
        if field in record and value is None:
            raise DataError(f"{where}: the field {field!r} is null. Give it text, or leave the record out.")
        if value is None:
            rename = f"If the data calls its fields otherwise, name them: -o {renamed_by}."
            raise DataError(
                f"{where} has no field {field!r}; it has {', '.join(map(str, record)) or 'none'}. "
                f"{rename if renamed_by else 'Every record needs ' + ', '.join(required) + '.'}"
            )
        text = plain_text(value)
        if text is None:
            raise DataError(f"{where}: the field {field!r} must be text; got {describe(value)}.")
        picked[field] = check_text(text, field, where)
    return picked


def plain_text(value: Any) -> str | None:
    """A text, or the text that stands for a number; None for anything else."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else None


def whole_number(value: Any) -> int | None:
    """A whole number, also if it is stored as a float; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_text(text: str, field: str, where: str) -> str:
    """A text that can be encoded.

    Raises:
        DataError: if it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the field {field!r} holds half of a surrogate pair, which is no text.") from error
    return text


def _read_file(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file, not {path.suffix or 'one without a suffix'}.")
    if path.suffix == ".parquet":
        _check_content(path)
        return _read_parquet(path)
    if path.suffix == ".json":
        return read_json_text(path)
    text = read_text(path)
    return _read_lines(path, text) if path.suffix == ".jsonl" else [row for _, row in csv_rows(text, str(path))[1]]


def read_json_text(path: Path) -> Any:
    """What a JSON file holds; JSON lines under the suffix .json, as Hub files often are, too.

    Raises:
        DataError: if it cannot be read or is no JSON; it names line and column.
    """
    text = read_text(path)
    try:
        with parsing(f"{path} is not valid JSON", DataError):
            return json.loads(text)
    except DataError as error:
        reason = error.__cause__
        if not isinstance(reason, json.JSONDecodeError):
            raise
        if reason.lineno > 1 and reason.msg == "Extra data":
            return _read_lines(path, text)
        where = f"{path}, line {reason.lineno}, column {reason.colno}"
        raise DataError(f"{where}: not valid JSON ({reason.msg}).") from reason


def read_text(path: Path, *, may_be_empty: bool = False) -> str:
    """The text of a UTF-8 file.

    Args:
        path: of the file.
        may_be_empty: whether an empty file is read as empty text.

    Raises:
        DataError: if it is empty, the pointer to a file that was not fetched, or no UTF-8.
    """
    _check_content(path, may_be_empty=may_be_empty)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} cannot be read.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _check_content(path: Path, *, may_be_empty: bool = False) -> None:
    with parsing(f"{path} cannot be read", DataError):
        size, is_pointer = path.stat().st_size, is_lfs_pointer(path)
    if not may_be_empty and size == 0:
        raise DataError(f"{path} is empty.")
    if is_pointer:
        raise DataError(f"{path} is a Git LFS pointer, not the data itself. Fetch the file with 'git lfs pull'.")


def _read_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with parsing(f"{path}, line {number}: not valid JSON", DataError):
                yield json.loads(line)


def csv_rows(text: str, name: str) -> tuple[list[str], Iterator[tuple[str, dict[str, str]]]]:
    """The header of a CSV table, and (where, row) of its rows. A row may have too few or too many cells.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        DataError: naming the line that cannot be read.
    """
    table = csv.DictReader(io.StringIO(text, newline=""), restval="")

    def rows() -> Iterator[tuple[str, dict[str, str]]]:
        while True:
            with parsing(f"{name}, line {table.line_num + 1} cannot be read as CSV", DataError):
                row = next(table, None)
            if row is None:
                return
            yield f"{name}, line {table.line_num}", row

    with parsing(f"{name}, line 1 cannot be read as CSV", DataError):
        return list(table.fieldnames or ()), rows()


def row_problem(row: Mapping[Any, Any]) -> str:
    """Why a row of a table cannot be used, a sentence; empty if it can."""
    return f"the row has more cells than the header; beyond it are {describe(row[None])}." if None in row else ""


def _read_parquet(path: Path) -> Iterable[Any]:
    from datasets import Dataset
    from pyarrow.parquet import read_table

    with parsing(f"{path} is not a readable Parquet file", DataError):
        return Dataset(read_table(path))  # no copy goes to a cache


def hub_parts(source: str) -> tuple[str, str | None, str]:
    """What a source on the Hub says: its id, configuration and split; see `read_records`. An empty split is none."""
    name, _, rest = source.partition(":")
    config, colon, split = rest.partition(":")
    if colon and "[" not in config:  # "train[:100]" is a split alone
        return name, config or None, split
    return name, None, rest


def load_hub(source: str, *, split: str | None = None, expected: str = "data file") -> Any:
    """A data set on the Hub.

    Args:
        source: Hub id, perhaps with a configuration; a split in it is ignored here. See `hub_parts`.
        split: its name, or a slice of it such as ``train[:100]``; None gives all of them by name.
        expected: what else ``source`` could have been, for messages.

    Raises:
        DataError: if the Hub has none of that name, or cannot be reached.
    """
    name, config, _ = hub_parts(source)
    if name in packaged_datasets():
        raise DataError(
            f"{name!r} is a kind of file, and no data set on the Hub. Name the {expected} itself: --data PATH."
        )
    from datasets import load_dataset

    asked: Any = (name,) if config is None else (name, config)
    try:
        return load_dataset(*asked) if split is None else load_dataset(*asked, split=split)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        # A ValueError: there is no such configuration or split, or none is named of several.
        hint = f" Name them: {name}:CONFIGURATION:SPLIT" if isinstance(error, ValueError) else ""
        raise DataError(
            f"there is no {expected} {source}, and the Hub did not give a data set of that name: "
            f"{first_line(error)}{hint}"
        ) from error


def _single_file(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and not is_hidden(file.name))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise DataError(f"{folder}: expected one {', '.join(SUFFIXES)} file in the folder; found {found}. Name one.")
    return files[0]


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES or source.count("/") > 1


def describe(value: Any) -> str:
    """A value in an error message: its type and how it begins."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):  # nested too deeply, or none of JSON's values
        text = shown(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
