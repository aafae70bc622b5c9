"""VTAB-1k as it is published: a folder for each task, with lists of the images of its splits."""

from __future__ import annotations

from pathlib import Path

from zinit.data.labelled.lists import list_lines
from zinit.data.labelled.parts import Labelled, Layout, Parts, Reading
from zinit.errors import DataError
from zinit.files import is_file, is_hidden
from zinit.tasks.vtab.config import Split
from zinit.tasks.vtab.facts import VTAB_TASKS

VTAB_LISTS = {"train800": ("train800.txt", "val200.txt"), "train800val200": ("train800val200.txt", "test.txt")}


def vtab_layout(split: Split, dataset: str | None) -> Layout:
    """Reads folders in VTAB-1k's layout, for `Reading.layouts`.

    Args:
        split: which lists are read.
        dataset: which task of a folder that holds several.
    """

    def read(root: Path, reading: Reading) -> Parts | None:
        folder = _find(root, dataset)
        return None if folder is None else _read(folder, split, reading)

    return read


def _find(root: Path, dataset: str | None) -> Path | None:
    """The folder of one task in VTAB-1k's layout; None if there is none."""
    folders = [path for path in root.iterdir() if not is_hidden(path.name)]
    tasks = sorted(path.name for path in folders if any(is_file(path / file) for file, _ in VTAB_LISTS.values()))
    here = any(is_file(root / file) for file, _ in VTAB_LISTS.values())
    if here and dataset in (None, root.name):
        return root
    if tasks and dataset is None:
        raise DataError(f"{root} holds several tasks: {', '.join(tasks)}. Name one: -o task.dataset={tasks[0]}")
    if dataset is None:
        return None
    if dataset not in tasks:
        raise DataError(
            f"{root} holds no task {dataset!r} in VTAB-1k's layout ({dataset}/train800val200.txt); "
            f"found {', '.join(tasks) or 'none'}. For class folders and tables leave task.dataset out."
        )
    return root / dataset


def _read(folder: Path, split: Split, reading: Reading) -> Parts:
    """The lists of a split: lines ``images/<split>/000000.jpg 7``, relative to the folder (6.1.4)."""
    first, second = (_read_list(folder, file, reading) for file in VTAB_LISTS[split])
    known = folder.name if folder.name in VTAB_TASKS else None
    examples = [*first, *second]
    count = VTAB_TASKS[known].classes if known else 1 + max((int(e.label) for e in examples), default=0)
    if count > max(2, len(examples)) and not known:
        raise DataError(f"{folder}: the labels go up to {count - 1}, but there are only {len(examples)} images.")
    val, test = (second, None) if split == "train800" else (None, second)
    labels = [str(label) for label in range(count)]
    return Parts(train=first, val=val, test=test, labels=labels, dataset=known, published=True)


def _read_list(folder: Path, name: str, reading: Reading) -> list[Labelled]:
    known, found = VTAB_TASKS.get(folder.name), []
    for where, line in list_lines(folder / name):
        path, _, label = line.rpartition(" ")
        if not path or not (label.isascii() and label.isdigit()):
            reading.bad(f"{where}: expected 'images/... LABEL' with a whole number from 0; got {line[:80]!r}.")
        elif known and int(label) >= known.classes:
            reading.bad(f"{where}: the label is {label}, but {folder.name} has {known.classes} classes, from 0.")
        elif image := reading.inside(folder, path.strip(), where):
            found.append(Labelled(image, str(int(label)), where))
    return found
