"""Tables of labelled images: CSV, Parquet in one file or in the Hub's shards, and data sets on the Hub."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zinit.data.images import Encoded
from zinit.data.labelled.lists import read_text
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.records import csv_rows, hub_parts, load_hub, read_document, row_problem
from zinit.errors import DataError
from zinit.files import parsing

VALIDATION = ("val", "validation", "valid", "dev")
PARTS = {"train": "train", "test": "test", **dict.fromkeys(VALIDATION, "val")}
SHARD = re.compile(r"(?P<part>\w+?)(-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?)?")  # some end in a hash


def read_csv(file: Path, reading: Reading) -> list[Labelled]:
    """A table with a header; paths are relative to it."""
    header, rows = csv_rows(read_text(file), str(file))
    image, label = reading.columns(header, str(file))
    found = []
    for where, record in rows:
        reading.unused(record, (image, label))
        path, name = record[image].strip(), record[label].strip()
        if problem := row_problem(record):
            reading.bad(f"{where}: {problem}")
        elif not path or not name:
            reading.bad(f"{where}: {image if not path else label} is empty.")
        elif found_file := reading.inside(file.parent, path, where):
            found.append(Labelled(found_file, name, where))
    if not found and not reading.skipped:
        raise DataError(f"{file} lists no image.")
    return found


def split_column(file: Path) -> str | None:
    """The column of a table that says which part an image is of, if there is one."""
    header, _ = csv_rows(read_text(file), str(file))
    return next((name for name in header if name.strip().lower() in ("split", "part", "fold", "subset")), None)


def read_parquet(file: Path, reading: Reading) -> list[Labelled]:
    """One Parquet file; no copy goes to a cache."""
    return _records(read_document(str(file))[0], str(file), reading)


def read_shards(root: Path, files: Sequence[Path], reading: Reading) -> Parts:
    """Parquet files named as on the Hub: ``train-00000-of-00002.parquet``, in the folder or in one below it.

    Args:
        root: of the data.
        files: all Parquet files in it, sorted.
        reading: see there.

    Raises:
        DataError: if none of them is of the training part, a shard is missing, or one is there twice.
    """
    shards: dict[str, dict[int, Path]] = defaultdict(dict)
    count: dict[str, int] = {}
    for file in files:
        name = SHARD.fullmatch(file.stem)
        if name is None or name["part"] not in PARTS:
            continue
        part, number = PARTS[name["part"]], int(name["number"] or 0)
        if count.setdefault(part, int(name["count"] or 1)) != int(name["count"] or 1):
            raise DataError(f"{root} holds files of two data sets for one part, such as {file}. Name one folder.")
        if (other := shards[part].setdefault(number, file)) is not file:
            raise DataError(f"{root} holds the same part of the data twice: {other} and {file}. Name one folder.")
    if "train" not in shards:
        raise DataError(
            f"{root} holds Parquet files, but no train.parquet. Name one of them: --data {files[0]}, or rename "
            f"them to train.parquet and test.parquet."
        )
    for part, mine in shards.items():
        if max(mine) >= count[part]:
            raise DataError(f"{mine[max(mine)]} is numbered beyond the {count[part]} files of its part. Remove it.")
        if missing := sorted(set(range(count[part])) - set(mine)):
            numbers = ", ".join(f"{number:05d}" for number in missing)
            raise DataError(
                f"{root}: of the {count[part]} files that {next(iter(mine.values())).name} is one of, {numbers} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Fetch what is missing."
            )
    return Parts.of(
        {part: [e for n in sorted(mine) for e in read_parquet(mine[n], reading)] for part, mine in shards.items()}
    )


def read_hub(source: str, reading: Reading) -> Parts:
    """A data set on the Hub; ``id:part`` or ``id:configuration:part`` names one part of it.

    Raises:
        DataError: if there is none, or it has no such part.
    """
    name, config, part = hub_parts(source)
    found: Any = load_hub(source, expected="folder")
    if "[" in part:  # a slice, which the Hub's loader cuts
        found = {part: load_hub(source, split=part, expected="folder")}
    train = part or (next(iter(found)) if len(found) == 1 else "train")
    if train not in found:
        where = f"{name}:{config}" if config else name
        raise DataError(f"{where} has no part {train!r}; it has {', '.join(found)}. Name one: --data {where}:PART")
    own = {"train": train}
    if not part:
        own |= {PARTS[other]: other for other in ("test", *reversed(VALIDATION)) if other in found and other != train}
    return Parts.of({part: _records(found[name_], f"{name}:{name_}", reading) for part, name_ in own.items()})


def _records(records: Any, name: str, reading: Reading) -> list[Labelled]:
    """Records with the bytes of an image, which are not read yet, and a label, which may be a number with a name."""
    from datasets import ClassLabel, Image, Value

    image, label = reading.columns(records.column_names, name)
    kind, labels = records.features[image], records.features[label]
    encoded = isinstance(kind, Value) and "binary" in kind.dtype
    if not (encoded or isinstance(kind, Image) or (isinstance(kind, dict) and "bytes" in kind)):
        raise DataError(f"{name}: the field {image!r} holds {kind}; expected images.")
    names = list(labels.names) if isinstance(labels, ClassLabel) else None
    if reading.named and names is None and not (isinstance(labels, Value) and "string" in labels.dtype):
        raise DataError(
            f"{name}: the field {label!r} holds {labels}; expected the names of the classes, which the text tower "
            f"reads. Name another field: -o task.fields={image},FIELD"
        )
    if names is not None:
        reading.names = list(dict.fromkeys([*(reading.names or ()), *names]))
    encoded_images = records.select_columns([image]).cast_column(image, Image(decode=False))
    for column in set(records.column_names) - {image, label}:
        reading.left_out[f"unused_field_{column}"] += len(records)
    with parsing(f"{name}: the field {label!r} cannot be read", DataError):
        targets = list(records[label])
    found = []
    for number, target in enumerate(targets):
        where = f"{name}, record {number + 1}"
        target = int(target) if isinstance(target, float) and target.is_integer() else target
        if isinstance(target, bool) or not isinstance(target, int | str) or target == "":
            reading.bad(f"{where}: {label!r} must be a whole number or a name; got {target!r}.")
        elif names and not (isinstance(target, int) and 0 <= target < len(names)):
            reading.bad(f"{where}: {label!r} is {target!r}, but there are {len(names)} classes, from 0.")
        else:
            source = Encoded(where, partial(_content, encoded_images, number, image, where))
            found.append(Labelled(source, names[int(target)] if names else str(target), where))
    return found


def _content(images: Any, number: int, image: str, where: str) -> bytes:
    with parsing(f"{where}: the field {image!r} cannot be read", DataError):
        content = (images[number][image] or {}).get("bytes")
    if not content:  # a path alone could lead anywhere
        raise DataError(f"{where}: the field {image!r} holds no image.")
    return content
