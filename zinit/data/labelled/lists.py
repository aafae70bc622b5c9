"""Lists of picture files: VTAB-1k's, plain ones, and the split files of CoOp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from zinit.data.images import SUFFIXES
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.errors import DataError
from zinit.files import is_lfs_pointer
from zinit.tasks.vtab.facts import VTAB_TASKS

VTAB_LISTS = {"train800": ("train800.txt", "val200.txt"), "train800val200": ("train800val200.txt", "test.txt")}


def read_vtab(folder: Path, reading: Reading) -> Parts:
    """The lists of ``reading.split``: lines ``images/<split>/000000.jpg 7``, relative to the folder (6.1.4)."""
    split = reading.split or "train800val200"
    first, second = (_vtab_list(folder, file, reading) for file in VTAB_LISTS[split])
    known = folder.name if folder.name in VTAB_TASKS else None
    examples = [*first, *second]
    count = VTAB_TASKS[known].classes if known else 1 + max((int(e.label) for e in examples), default=0)
    if count > max(2, len(examples)) and not known:
        raise DataError(f"{folder}: the labels go up to {count - 1}, but there are only {len(examples)} pictures.")
    val, test = (second, None) if split == "train800" else (None, second)
    return Parts(train=first, val=val, test=test, labels=[str(label) for label in range(count)], vtab=known)


def _vtab_list(folder: Path, name: str, reading: Reading) -> list[Labelled]:
    known, found = VTAB_TASKS.get(folder.name), []
    for where, line in _lines(folder / name):
        path, _, label = line.rpartition(" ")
        if not path or not (label.isascii() and label.isdigit()):
            reading.bad(f"{where}: expected 'images/... LABEL' with a whole number from 0; got {line[:80]!r}.")
        elif known and int(label) >= known.classes:
            reading.bad(f"{where}: the label is {label}, but {folder.name} has {known.classes} classes, from 0.")
        elif picture := reading.inside(folder, path.strip(), where):
            found.append(Labelled(picture, str(int(label)), where))
    return found


def read_list(file: Path, reading: Reading) -> list[Labelled]:
    """Lines ``path label``, or ``path`` alone where the picture's folder is its class."""
    root, folders = file.parent, [entry for entry in file.parent.iterdir() if entry.is_dir()]
    found = []
    for where, line in _lines(file):
        path, label = line, ""
        if Path(line).suffix.lower() not in SUFFIXES:
            path, _, label = line.rpartition(" ")
        label = label or Path(path).parent.name
        if not path or not label:
            reading.bad(f"{where}: expected 'path/to/picture.jpg LABEL', or 'CLASS/picture.jpg'; got {line[:80]!r}.")
            continue
        base = root
        if len(folders) == 1 and not (root / path).exists():
            base = folders[0]  # as Caltech 101 is packed: the lists lie beside the folder they speak of
        if picture := reading.inside(base, path, where):
            found.append(Labelled(picture, label, where))
    return found


def read_coop(file: Path, reading: Reading) -> Parts:
    """CoOp's format: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("train"), list) or "test" not in document:
        raise DataError(f'{file}: expected {{"train": [[path, label, class name], ...], "val": ..., "test": ...}}.')
    root = file.parent / reading.folder
    if not root.is_dir():
        raise DataError(f"there is no folder {root} of pictures. Name it, seen from {file.name}: -o task.folder=NAME")
    names: dict[int, str] = {}
    parts: dict[str, list[Labelled]] = {}
    for part in ("train", "val", "test"):
        parts[part] = []
        for number, entry in enumerate(document.get(part) or [], start=1):
            where = f"{file}, {part}, entry {number}"
            types = [type(value) for value in entry] if isinstance(entry, list) else []
            if types != [str, int, str] or not (entry[0] and entry[2].strip()):
                reading.bad(f"{where}: expected [path, label, class name]; got {entry!r}.")
                continue
            path, label, name = entry
            if names.setdefault(label, name) != name:
                reading.bad(f"{where}: label {label} is {name!r} here and {names[label]!r} before.")
            elif picture := reading.inside(root, path, where):
                parts[part].append(Labelled(picture, name, where))
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise DataError(f"{file}: several labels share the class name {twice[0]!r}. Give each class its own name.")
    labels = [names[label] for label in sorted(names)]
    return Parts(train=parts["train"], val=parts["val"] or None, test=parts["test"], labels=labels)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of the lines that are not empty."""
    lines = [(number, line.strip()) for number, line in enumerate(read_text(file).split("\n"), start=1)]
    if not any(line for _, line in lines):
        raise DataError(f"{file} lists no picture.")
    return ((f"{file}, line {number}", line) for number, line in lines if line)


def read_text(file: Path) -> str:
    """The text of a list.

    Raises:
        DataError: if it is missing, no UTF-8, or the pointer to a file that was not fetched.
    """
    if not file.is_file():
        raise DataError(f"there is no list {file}.")
    if is_lfs_pointer(file):
        raise DataError(f"{file} is a Git LFS pointer, not the list itself. Fetch the file with 'git lfs pull'.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file} is not readable as UTF-8 text: {error}.") from error
    return text
