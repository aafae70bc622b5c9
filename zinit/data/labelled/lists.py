"""Lists of image files: plain ones, and the split files of CoOp."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zinit.data import records
from zinit.data.images import SUFFIXES
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.records import describe, plain_text, whole_number
from zinit.errors import DataError
from zinit.files import is_file, is_folder, is_hidden


def read_list(file: Path, reading: Reading) -> list[Labelled]:
    """Lines ``path label``, or ``path`` alone where the image's folder is its class."""
    root = file.parent
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    found = []
    for where, line in list_lines(file):
        path, label = line, ""
        if Path(line).suffix.lower() not in SUFFIXES:
            path, _, label = line.rpartition(" ")
        label = label or Path(path).parent.name
        if not path or not label:
            reading.bad(f"{where}: expected 'path/to/image.jpg LABEL', or 'CLASS/image.jpg'; got {line[:80]!r}.")
            continue
        base = root
        if len(folders) == 1 and not os.path.exists(root / path):
            base = folders[0]  # as Caltech 101 is packed: the lists are beside the folder that they name
        if image := reading.inside(base, path, where):
            found.append(Labelled(image, label, where))
    return found


def read_coop(file: Path, reading: Reading) -> Parts:
    """CoOp's format: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    document = records.read_json_text(file)
    if not isinstance(document, dict) or not isinstance(document.get("train"), list) or "test" not in document:
        raise DataError(f'{file}: expected {{"train": [[path, label, class name], ...], "val": ..., "test": ...}}.')
    root = file.parent / reading.folder
    if not is_folder(root):
        raise DataError(f"there is no folder {root} of images. Name it, seen from {file.name}: -o task.folder=NAME")
    names: dict[int, str] = {}
    parts: dict[str, list[Labelled]] = {}
    for part in ("train", "val", "test"):
        parts[part] = []
        entries = document.get(part) or []
        if not isinstance(entries, list):
            raise DataError(f"{file}: {part!r} must be a list of [path, label, class name]; got {describe(entries)}.")
        for number, entry in enumerate(entries, start=1):
            where = f"{file}, {part}, entry {number}"
            if (checked := _coop_entry(entry)) is None:
                reading.bad(f"{where}: expected [path, label, class name]; got {describe(entry)}.")
                continue
            path, label, name = checked
            if names.setdefault(label, name) != name:
                reading.bad(f"{where}: label {label} is {name!r} here and {names[label]!r} before.")
            elif image := reading.inside(root, path, where):
                parts[part].append(Labelled(image, name, where))
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise DataError(f"{file}: several labels share the class name {twice[0]!r}. Give each class its own name.")
    labels = [names[label] for label in sorted(names)]
    return Parts(train=parts["train"], val=parts["val"] or None, test=parts["test"], labels=labels, published=True)


def _coop_entry(entry: Any) -> tuple[str, int, str] | None:
    """Path, label and class name; a whole number is as good a name as a text. None if they are not."""
    if not isinstance(entry, list) or len(entry) != 3:
        return None
    path, label, name = entry[0], whole_number(entry[1]), plain_text(entry[2])
    if not isinstance(path, str) or not path or label is None or name is None or not name.strip():
        return None
    return path, label, name


def list_lines(file: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the lines that are not empty."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(file).split("\n"), start=1)]
    if not any(line for _, line in lines):
        raise DataError(f"{file} lists no image.")
    return ((f"{file}, line {number}", line) for number, line in lines if line)


def read_text(file: Path) -> str:
    """The text of a list, which may be empty.

    Raises:
        DataError: if it is missing, no UTF-8, or the pointer to a file that was not fetched.
    """
    if not is_file(file):
        raise DataError(f"there is no list {file}.")
    return records.read_text(file, may_be_empty=True)
