"""Records from local files and the Hub, with errors that name file, record and field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zinit.errors import DataError, first_line
from zinit.files import is_lfs_pointer

SUFFIXES = (".json", ".jsonl", ".parquet")


def read_records(
    source: str, *, required: Sequence[str], optional: Sequence[str] = (), renamed_by: str = ""
) -> list[dict[str, str]]:
    """Text records of a JSON array, JSON lines or Parquet file, of a folder holding one such file, or of a Hub id.

    Args:
        source: path, or Hub id such as ``tatsu-lab/alpaca`` (its ``train`` split; ``id:split`` names another).
        required: fields that every record must have.
        optional: fields that are empty text where a record lacks them.
        renamed_by: the option that names the fields otherwise (``task.fields=a,b``), for messages; empty if none does.

    Raises:
        DataError: if the source is missing, unreadable, empty or lacks a field; it names the record.
    """
    records, name = read_document(source)
    if isinstance(records, dict | str) or not isinstance(records, Iterable):
        raise DataError(f"{name}: expected a JSON array of records; got {describe(records)}.")
    found = [_pick(record, index, name, required, optional, renamed_by) for index, record in enumerate(records)]
    if not found:
        raise DataError(f"{name} holds no records.")
    return found


def read_document(source: str) -> tuple[Any, str]:
    """What a source holds, whatever its structure, and its name for messages.

    Args:
        source: see `read_records`; JSON need not be an array here.

    Returns:
        The document of a JSON file, an iterable of the records of any other source.

    Raises:
        DataError: if the source is missing, unreadable or empty.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _single_file(path)
    if path.is_file():
        return _read_file(path), str(path)
    if _looks_like_path(source):
        raise DataError(f"there is no data file {source}. Expected a {', '.join(SUFFIXES)} file or a Hub id.")
    return load_hub(source, split=source.partition(":")[2] or "train"), source


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
        if not isinstance(value, str):
            raise DataError(f"{where}: the field {field!r} must be text; got {describe(value)}.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the field {field!r} holds half of a surrogate pair, which is no text."
            ) from error
        picked[field] = value
    return picked


def _read_file(path: Path) -> Any:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file, not {path.suffix or 'one without a suffix'}.")
    if path.suffix == ".parquet":
        _check_content(path)
        return _read_parquet(path)
    text = read_text(path)
    if path.suffix == ".jsonl":
        return _read_lines(path, text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.lineno > 1 and error.msg == "Extra data":
            return _read_lines(path, text)  # JSON lines under the suffix .json, as Hub files often are
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}).") from error


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
    if not may_be_empty and path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    if is_lfs_pointer(path):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself. Fetch the file with 'git lfs pull'.")


def _read_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error


def _read_parquet(path: Path) -> Iterable[Any]:
    from datasets import Dataset
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)  # no copy goes to a cache
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {first_line(error)}") from error
    return Dataset(table)


def load_hub(source: str, *, split: str | None = None, expected: str = "data file") -> Any:
    """A data set on the Hub.

    Args:
        source: Hub id; what follows a colon is ignored here.
        split: its name, or a slice of it such as ``train[:100]``; None gives all of them by name.
        expected: what else ``source`` could have been, for messages.

    Raises:
        DataError: if the Hub has none of that name, or cannot be reached.
    """
    from datasets import load_dataset

    name = source.partition(":")[0]
    try:
        return load_dataset(name) if split is None else load_dataset(name, split=split)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        raise DataError(
            f"there is no {expected} {source}, and the Hub did not give a data set of that name: {first_line(error)}"
        ) from error


def _single_file(folder: Path) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise DataError(f"{folder}: expected one {', '.join(SUFFIXES)} file in the folder; found {found}. Name one.")
    return files[0]


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES or source.count("/") > 1


def describe(value: Any) -> str:
    """A value in an error message: its type and how it begins."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
