"""Labelled pictures from wherever they lie: VTAB-1k's lists, class folders, list files, CSV, Parquet, the Hub.

Every reader answers with `Parts`; nothing is decoded here. What cannot be used is an error that names file and line, or
is counted, as the caller wants it.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zinit.errors import DataError
from zinit.images import SUFFIXES, Encoded, OnBad, Picture, class_folders, inside
from zinit.tasks._vtab_facts import VTAB_TASKS

LISTS = {"train800": ("train800.txt", "val200.txt"), "train800val200": ("train800val200.txt", "test.txt")}
COLUMNS = {"image": ("image", "img", "filepath", "file", "path"), "label": ("label", "labels", "class")}
VALIDATION = ("val", "validation", "valid", "dev")


class Labelled(NamedTuple):
    """A picture and its class.

    Attributes:
        picture: file, bytes, or in memory.
        label: name of its class.
        where: file and line, or the like, for messages; empty where the picture's own name says it.
    """

    picture: Picture
    label: str
    where: str = ""


@dataclass(kw_only=True)
class Parts:
    """What a source holds.

    Attributes:
        train: always there.
        val: None if the source has none.
        test: None if the source has none.
        labels: names of the classes in order, if the source knows them; else those that occur.
        skipped: why some were left out.
        vtab: the task of VTAB-1k that this is, if it is one.
    """

    train: list[Labelled]
    val: list[Labelled] | None = None
    test: list[Labelled] | None = None
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    vtab: str | None = None

    def choose(self, split: str, seed: int) -> tuple[list[Labelled], list[Labelled]]:
        """What is trained on and what is evaluated.

        Args:
            split: "train800val200": everything but the test part is trained on. "train800": a validation part is
                evaluated, and no test picture is touched.
            seed: of the parts that the source lacks: a tenth of everything for the test, a fifth of training for
                validation (as 200 of VTAB's 1,000), class by class.
        """
        train, val, test = self.train, self.val, self.test
        if val is None and test is None:
            train, test = hold_out(train, 10, seed)
        if split == "train800":
            return (train, val) if val is not None else hold_out(train, 5, seed)
        if test is None:
            return train, val or []
        return train + (val or []), test

    def everything(self, split: str) -> list[Labelled]:
        """What is evaluated if nothing is trained on: the part for it, or all where there are no parts."""
        return self.train if self.val is None and self.test is None else self.choose(split, 0)[1]


def hold_out(examples: Sequence[Labelled], share: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Sets one of ``share`` apart, class by class; at least one of every class that has two.

    Returns:
        What stays, and what was set apart, both in the order of ``examples``.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_class[example.label].append(index)
    generator = torch.Generator().manual_seed(seed)
    apart: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        count = max(1, len(members) // share) if len(members) > 1 else 0
        apart |= {members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist()}
    stay = [example for index, example in enumerate(examples) if index not in apart]
    return stay, [examples[index] for index in sorted(apart)]


class Reader:
    """Reads one source.

    Args:
        split: see `Parts.choose`; it decides which of VTAB's lists are read.
        dataset: which task of a folder of several, or which embedded data.
        on_bad: "error" stops at the first bad entry; "skip" leaves it out and notes why.
        columns: of picture and label in CSV, Parquet and Hub data; None tries the usual names.
    """

    def __init__(self, split: str, dataset: str | None, on_bad: OnBad, columns: Sequence[str] | None) -> None:
        self.split, self.dataset, self.on_bad, self.columns = split, dataset, on_bad, columns
        self.skipped: list[str] = []
        self.names: list[str] | None = None  # of the classes, where the data names them

    def read(self, source: str | None) -> Parts:
        """All that is there.

        Args:
            source: folder, file or Hub id; None is the embedded demo's.

        Raises:
            DataError: if it is missing, or nothing of the kind that is expected.
        """
        if source is None:
            parts = self._demo()
        elif (path := Path(source).expanduser()).is_dir():
            parts = self._folder(path)
        elif path.is_file():
            parts = self._file(path)
        elif source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in (".csv", ".parquet"):
            raise DataError(
                f"there is no {source}. Expected a folder of pictures, a .csv or .parquet file, or a Hub id."
            )
        else:
            parts = self._hub(source)
        parts.skipped, parts.labels = self.skipped, parts.labels or self.names
        return parts

    def _bad(self, message: str) -> None:
        if self.on_bad == "error":
            raise DataError(message)
        self.skipped.append(message)

    def _demo(self) -> Parts:
        from zinit import demo

        labels, parts = demo.pictures(self.dataset or "digits")  # pyright: ignore[reportAttributeAccessIssue]
        found = {
            name: [Labelled(image, labels[label], f"{name} {i}") for i, (image, label) in enumerate(examples)]
            for name, examples in parts.items()
        }
        return Parts(train=found["train800"], val=found["val200"], test=found["test"], labels=list(labels))

    def _folder(self, root: Path) -> Parts:
        tasks = sorted(p.name for p in root.iterdir() if any((p / file).is_file() for file, _ in LISTS.values()))
        here = any((root / file).is_file() for file, _ in LISTS.values())
        if here and self.dataset in (None, root.name):
            return self._vtab(root)
        if tasks and self.dataset is None:
            raise DataError(f"{root} holds several tasks: {', '.join(tasks)}. Name one: -o task.dataset={tasks[0]}")
        if self.dataset is not None:
            if self.dataset not in tasks:
                raise DataError(
                    f"{root} holds no task {self.dataset!r} in VTAB-1k's layout ({self.dataset}/train800val200.txt); "
                    f"found {', '.join(tasks) or 'none'}."
                )
            return self._vtab(root / self.dataset)
        for suffix, read in ((".txt", self._list), (".csv", self._csv), (".parquet", self._parquet)):
            files = {name: root / f"{name}{suffix}" for name in ("train", "val", "test")}
            if files["train"].is_file():
                found = {name: read(file) for name, file in files.items() if file.is_file()}
                return _parts(found)
        named = {
            "test": root / "test",
            "val": next((root / n for n in VALIDATION if (root / n).is_dir()), root / "val"),
        }
        there = {name: folder for name, folder in named.items() if folder.is_dir()}
        if (root / "train").is_dir() and there:
            labels, train = self._classes(root / "train")
            return _parts({"train": train, **{n: self._classes(f)[1] for n, f in there.items()}}, labels)
        parquet = sorted(root.rglob("*.parquet"))
        if parquet:
            raise DataError(
                f"{root} holds Parquet files, but no train.parquet. Name one of them: --data {parquet[0]}, or rename "
                f"them to train.parquet and test.parquet."
            )
        labels, examples = self._classes(root)
        return Parts(train=examples, labels=labels)

    def _classes(self, folder: Path) -> tuple[list[str], list[Labelled]]:
        labels, found = class_folders(folder)
        return labels, [Labelled(file, labels[label]) for file, label in found]

    def _file(self, path: Path) -> Parts:
        if path.suffix == ".csv":
            return Parts(train=self._csv(path))
        if path.suffix == ".parquet":
            return Parts(train=self._parquet(path))
        raise DataError(f"{path}: expected a folder of pictures, a .csv or .parquet file, or a Hub id.")

    def _vtab(self, folder: Path) -> Parts:
        """6.1.4: ``<split>.txt`` with lines ``images/<split>/000000.jpg 7``, relative to the folder."""
        first, second = (self._vtab_list(folder, file) for file in LISTS[self.split])
        known = folder.name if folder.name in VTAB_TASKS else None
        examples = [*first, *second]
        count = VTAB_TASKS[known].classes if known else 1 + max((int(e.label) for e in examples), default=0)
        if count > max(2, len(examples)) and not known:
            raise DataError(f"{folder}: the labels go up to {count - 1}, but there are only {len(examples)} pictures.")
        parts = Parts(train=first, labels=[str(label) for label in range(count)], vtab=known)
        if self.split == "train800":
            parts.val = second
        else:
            parts.test = second
        return parts

    def _vtab_list(self, folder: Path, name: str) -> list[Labelled]:
        file, known = folder / name, VTAB_TASKS.get(folder.name)
        found = []
        for where, line in self._lines(file):
            path, _, label = line.rpartition(" ")
            if not path or not (label.isascii() and label.isdigit()):
                self._bad(f"{where}: expected 'images/... LABEL' with a whole number from 0; got {line[:80]!r}.")
            elif known and int(label) >= known.classes:
                self._bad(f"{where}: the label is {label}, but {folder.name} has {known.classes} classes, from 0.")
            elif picture := self._inside(folder, path.strip(), where):
                found.append(Labelled(picture, str(int(label)), where))
        return found

    def _list(self, file: Path) -> list[Labelled]:
        """Lines ``path label``, or ``path`` alone where the picture's folder is its class."""
        root, folders = file.parent, [entry for entry in file.parent.iterdir() if entry.is_dir()]
        found = []
        for where, line in self._lines(file):
            path, label = line, ""
            if Path(line).suffix.lower() not in SUFFIXES:
                path, _, label = line.rpartition(" ")
            label = label or Path(path).parent.name
            if not path or not label:
                self._bad(f"{where}: expected 'path/to/picture.jpg LABEL', or 'CLASS/picture.jpg'; got {line[:80]!r}.")
                continue
            base = root
            if len(folders) == 1 and not (root / path).exists():
                base = folders[0]  # as Caltech 101 is packed: the lists lie beside the folder they speak of
            if picture := self._inside(base, path, where):
                found.append(Labelled(picture, label, where))
        return found

    def _csv(self, file: Path) -> list[Labelled]:
        """A table with a header; paths are relative to it."""
        table = csv.DictReader(io.StringIO(_text(file), newline=""))
        image, label = self._pick_columns(table.fieldnames or (), str(file))
        found = []
        for row in table:
            where = f"{file}, line {table.line_num}"
            path, name = (row[image] or "").strip(), (row[label] or "").strip()
            if not path or not name:
                self._bad(f"{where}: {image if not path else label} is empty.")
            elif picture := self._inside(file.parent, path, where):
                found.append(Labelled(picture, name, where))
        if not found and not self.skipped:
            raise DataError(f"{file} lists no picture.")
        return found

    def _parquet(self, file: Path) -> list[Labelled]:
        from datasets import Dataset
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table

        try:
            dataset = Dataset(read_table(file))  # no copy goes to a cache
        except (ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        return self._records(dataset, str(file))

    def _hub(self, source: str) -> Parts:
        from datasets import load_dataset

        name, _, split = source.partition(":")
        try:
            found: Any = load_dataset(name)
        except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"there is no folder {source}, and the Hub did not give a data set of that name: {reason}"
            ) from error
        train = split or "train"
        if train not in found:
            raise DataError(f"{name} has no part {train!r}; it has {', '.join(found)}. Name one: --data {name}:PART")
        names: dict[str, str] = {"train": train}
        if not split:
            names |= {"test": "test"} if "test" in found else {}
            names |= {"val": next(val for val in VALIDATION if val in found)} if set(VALIDATION) & set(found) else {}
        return _parts({part: self._records(found[own], f"{name}:{own}") for part, own in names.items()})

    def _records(self, dataset: Any, name: str) -> list[Labelled]:
        """Records with the bytes of a picture and a label, which may be a number with a name."""
        from datasets import ClassLabel, Image

        image, label = self._pick_columns(dataset.column_names, name)
        if isinstance(dataset.features[image], Image):
            dataset = dataset.cast_column(image, Image(decode=False))
        kind, found = dataset.features[label], []
        names = self.names = list(kind.names) if isinstance(kind, ClassLabel) else None
        for number, record in enumerate(dataset.select_columns([image, label]), start=1):
            where, value, target = f"{name}, record {number}", record[image], record[label]
            if not (isinstance(value, dict) and value.get("bytes")):  # a path alone could lead anywhere
                self._bad(f"{where}: {image!r} holds no picture ({type(value).__name__}).")
            elif isinstance(target, bool) or not isinstance(target, int | str) or target == "":
                self._bad(f"{where}: {label!r} must be a whole number or a name; got {target!r}.")
            elif names and not (isinstance(target, int) and 0 <= target < len(names)):
                self._bad(f"{where}: {label!r} is {target!r}, but there are {len(names)} classes, from 0.")
            else:
                picture = Encoded(where, partial(bytes, value["bytes"]))
                found.append(Labelled(picture, names[int(target)] if names else str(target), where))
        return found

    def _pick_columns(self, there: Iterable[str], name: str) -> tuple[str, str]:
        there, picked = list(there), []
        for position, (what, usual) in enumerate(COLUMNS.items()):
            wanted = usual if self.columns is None else (self.columns[position],)
            column = next((column for column in wanted if column in there), None)
            if column is None:
                raise DataError(
                    f"{name} has no column {' or '.join(map(repr, wanted))} for the {what}; it has "
                    f"{', '.join(map(repr, there)) or 'none'}. Name both: -o task.fields=IMAGE,LABEL"
                )
            picked.append(column)
        return picked[0], picked[1]

    def _lines(self, file: Path) -> Iterator[tuple[str, str]]:
        """(where, text) of the lines that are not empty."""
        lines = [(number, line.strip()) for number, line in enumerate(_text(file).split("\n"), start=1)]
        if not any(line for _, line in lines):
            raise DataError(f"{file} lists no picture.")
        return ((f"{file}, line {number}", line) for number, line in lines if line)

    def _inside(self, folder: Path, path: str, where: str) -> Path | None:
        try:
            return inside(folder, path)
        except (DataError, ValueError, OSError) as error:  # a path may hold a zero byte or be too long
            self._bad(f"{where}: {error}")
            return None


def _parts(found: dict[str, list[Labelled]], labels: list[str] | None = None) -> Parts:
    return Parts(train=found["train"], val=found.get("val"), test=found.get("test"), labels=labels)


def class_names(parts: Parts) -> list[str]:
    """The classes that occur, in the order of their numbers if they are numbers."""
    found = {example.label for part in (parts.train, parts.val, parts.test) for example in part or ()}
    numbers = all(name.isascii() and name.isdigit() for name in found)
    return sorted(found, key=lambda name: (int(name), name) if numbers else (0, name))


def _text(file: Path) -> str:
    if not file.is_file():
        raise DataError(f"there is no list {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file} is not readable as UTF-8 text: {error}.") from error
    if text.startswith("version https://git-lfs.github.com/spec"):
        raise DataError(f"{file} is a Git LFS pointer, not the list itself. Fetch the file with 'git lfs pull'.")
    return text
