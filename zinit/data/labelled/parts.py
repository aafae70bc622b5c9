"""Labelled images and the parts of a data set, and how one is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zinit.data.images import ImageSource, inside
from zinit.data.records import unused_fields
from zinit.errors import DataError
from zinit.validation import OnBad

COLUMNS = {"image": ("image", "img", "filepath", "file", "path"), "label": ("label", "labels", "class")}


class Labelled(NamedTuple):
    """An image and its class.

    Attributes:
        image: file, bytes, or in memory.
        label: name of its class.
        where: file and line, or the like, for messages; empty where the image's own name says it.
    """

    image: ImageSource
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
        dataset: name of the published data set that this is, if a layout knows it.
        published: whether a published list says which image is in which part: the parts stay as they are then.
        left_out: files and columns that were passed over, by reason.
    """

    train: list[Labelled]
    val: list[Labelled] | None = None
    test: list[Labelled] | None = None
    labels: list[str] | None = None
    skipped: list[str] = field(default_factory=list)
    dataset: str | None = None
    published: bool = False
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, found: Mapping[str, list[Labelled]], labels: list[str] | None = None) -> Parts:
        """From what was found under "train" and perhaps "val" and "test"."""
        return cls(train=found["train"], val=found.get("val"), test=found.get("test"), labels=labels)

    def __iter__(self) -> Iterator[Labelled]:
        """Every image of every part."""
        return (example for part in (self.train, self.val, self.test) for example in part or ())

    def __len__(self) -> int:
        return sum(len(part or ()) for part in (self.train, self.val, self.test))

    @property
    def whole(self) -> bool:
        """Whether the source has no parts of its own."""
        return self.val is None and self.test is None


Layout = Callable[[Path, "Reading"], Parts | None]


@dataclass(kw_only=True)
class Reading:
    """How one source is read, and what of it could not be used.

    Args:
        on_bad: "error" stops at the first bad entry; "skip" leaves it out and notes why.
        fields: what CSV, Parquet and Hub data call image and class; None tries the usual names.
        named: whether classes must have names, because a text tower reads them: numbers in a table are refused then.
        layouts: a task's own layouts of folders, tried before all others: each reads a folder, or returns None.
        folder: where the images of a split_zhou_*.json file are, seen from that file.
        fewest: classes that a folder of class folders must have; one is enough where a finished run knows the others.

    Attributes:
        skipped: why entries were left out.
        left_out: see `Parts`.
        names: of the classes, where a table names them.
    """

    on_bad: OnBad = "error"
    fields: Sequence[str] | None = None
    named: bool = False
    layouts: Sequence[Layout] = ()
    folder: str = "."
    fewest: int = 2
    skipped: list[str] = field(default_factory=list, init=False)
    left_out: Counter[str] = field(default_factory=Counter, init=False)
    names: list[str] | None = field(default=None, init=False)

    def bad(self, message: str) -> None:
        """An entry cannot be used.

        Raises:
            DataError: unless such entries are skipped.
        """
        if self.on_bad == "error":
            raise DataError(message)
        self.skipped.append(message)

    def unused(self, record: Mapping[str, str], columns: Sequence[str]) -> None:
        """Counts the columns of a record that hold something and are not read."""
        self.left_out.update(unused_fields(record, columns))

    def inside(self, folder: Path, path: str, where: str) -> Path | None:
        """A path that an entry names, which must stay in the folder; None if it is skipped."""
        try:
            return inside(folder, path)
        except DataError as error:
            self.bad(f"{where}: {error}")
            return None

    def columns(self, there: Iterable[str], name: str) -> tuple[str, str]:
        """Which columns of a table hold image and class.

        Raises:
            DataError: if one is missing; it names those that are there.
        """
        there, picked = list(there), []
        for position, (what, usual) in enumerate(COLUMNS.items()):
            wanted = usual if self.fields is None else (self.fields[position],)
            column = next((column for column in wanted if column in there), None)
            if column is None and self.fields is not None:
                raise DataError(
                    f"{name} has no field {wanted[0]!r}; it has {', '.join(there) or 'none'}. "
                    f"Name image and class: -o task.fields={','.join(there[:2])}"
                )
            if column is None:
                raise DataError(
                    f"{name} has no column {' or '.join(map(repr, wanted))} for the {what}; it has "
                    f"{', '.join(map(repr, there)) or 'none'}. Name both: -o task.fields=IMAGE,LABEL"
                )
            picked.append(column)
        return picked[0], picked[1]


def skipped_files(left_out: Mapping[str, int]) -> int:
    """How many files, of what was passed over, were left out."""
    return sum(count for reason, count in left_out.items() if reason.startswith("files_skipped"))


def class_names(parts: Parts) -> list[str]:
    """The classes that occur, in the order of their numbers if they are numbers."""
    found = {example.label for example in parts}
    numbers = all(name.isascii() and name.isdigit() for name in found)
    return sorted(found, key=lambda name: (int(name), name) if numbers else (0, name))
