"""Labelled pictures from wherever they lie: folders, lists, tables, the Hub, or the embedded demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from zinit.data.images import class_folders
from zinit.data.labelled.lists import VTAB_LISTS, read_coop, read_list, read_vtab
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.records import PARTS, VALIDATION, read_csv, read_hub, read_parquet, read_shards, split_column
from zinit.errors import DataError

SUFFIXES = (".csv", ".json", ".parquet")
Embedded = tuple[Sequence[str], Mapping[str, Sequence[tuple[Image.Image, int]]]]


def read_pictures(source: str | None, reading: Reading, demo: Callable[[], Embedded]) -> Parts:
    """Reads which pictures there are, not the pictures.

    Args:
        source: a folder of class folders, or with such folders in ``train`` and ``test``; a folder with lists, tables
            or Parquet shards named after the parts; one of VTAB-1k's; a ``split_zhou_*.json`` of CoOp, or the folder
            of one; a CSV or Parquet file; a Hub id (``id:part`` names one part). None is the embedded demo's.
        reading: how, and where what cannot be used is noted.
        demo: class names of the embedded data, and (picture, label) pairs by part.

    Raises:
        DataError: if it is missing, or nothing of the kind that is expected.
    """
    if source is None:
        parts = _embedded(*demo())
    elif (path := Path(source).expanduser()).is_dir():
        parts = _folder(path, reading)
    elif path.is_file():
        parts = _file(path, reading)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in SUFFIXES:
        raise DataError(
            f"there is no {source}. Expected a folder of pictures, a .csv, .parquet or split_zhou_*.json file, or a "
            f"Hub id."
        )
    else:
        parts = read_hub(source, reading)
    parts.skipped, parts.labels = reading.skipped, parts.labels or reading.names
    return parts


def _embedded(names: Sequence[str], pictures: Mapping[str, Sequence[tuple[Image.Image, int]]]) -> Parts:
    found = {
        {"train800": "train", "val200": "val"}.get(part, part): [
            Labelled(image, names[label], f"{part} {i}") for i, (image, label) in enumerate(pairs)
        ]
        for part, pairs in pictures.items()
    }
    return Parts.of(found, list(names))


def _file(path: Path, reading: Reading) -> Parts:
    if path.suffix == ".json":
        return read_coop(path, reading)
    if path.suffix == ".csv" and (column := split_column(path)):
        raise DataError(
            f"{path} has a column {column!r}, which is not read: pictures to test on would be trained on. "
            f"Make a file of each part (train.csv, test.csv) and name their folder, or remove the column."
        )
    if path.suffix in (".csv", ".parquet"):
        return Parts(train=(read_csv if path.suffix == ".csv" else read_parquet)(path, reading))
    raise DataError(f"{path}: expected a folder of pictures, a .csv, .parquet or split_zhou_*.json file, or a Hub id.")


def _folder(root: Path, reading: Reading) -> Parts:
    if reading.split is not None and (lists := _vtab_folder(root, reading.dataset)) is not None:
        return read_vtab(lists, reading)
    splits = sorted(root.glob("split_zhou_*.json"))
    if len(splits) > 1:
        raise DataError(f"{root} holds several split files, {', '.join(f.name for f in splits)}. Name one of them.")
    if splits:
        return read_coop(splits[0], reading)
    for suffix, read in ((".txt", read_list), (".csv", read_csv)):
        files = {part: file for name, part in reversed(PARTS.items()) if (file := root / f"{name}{suffix}").is_file()}
        if "train" in files:
            return Parts.of({part: read(file, reading) for part, file in files.items()})
    folders = {"test": root / "test", "val": next((root / n for n in VALIDATION if (root / n).is_dir()), root / "val")}
    there = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if (root / "train").is_dir() and there:
        labels, train = _classes(root / "train")
        return Parts.of({"train": train, **{name: _classes(folder)[1] for name, folder in there.items()}}, labels)
    if parquet := sorted(root.rglob("*.parquet")):
        return read_shards(root, parquet, reading)
    labels, examples = _classes(root)
    return Parts(train=examples, labels=labels)


def _classes(folder: Path) -> tuple[list[str], list[Labelled]]:
    labels, found = class_folders(folder)
    return labels, [Labelled(file, labels[label]) for file, label in found]


def _vtab_folder(root: Path, dataset: str | None) -> Path | None:
    """The folder of one task in VTAB-1k's layout; None if there is none."""
    tasks = sorted(p.name for p in root.iterdir() if any((p / file).is_file() for file, _ in VTAB_LISTS.values()))
    here = any((root / file).is_file() for file, _ in VTAB_LISTS.values())
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
