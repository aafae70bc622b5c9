"""Labelled images from any source: folders, lists, tables, the Hub, or the embedded demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from zinit.data.images import class_folders
from zinit.data.labelled.lists import read_coop, read_list
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.records import PARTS, VALIDATION, read_csv, read_hub, read_parquet, read_shards, split_column
from zinit.errors import DataError

SUFFIXES = (".csv", ".json", ".parquet")
Embedded = tuple[Sequence[str], Mapping[str, Sequence[tuple[Image.Image, int]]]]


def read_images(source: str | None, reading: Reading, demo: Callable[[], Embedded]) -> Parts:
    """The images of a source and their labels; no image is read.

    Args:
        source: a folder of class folders, or with such folders in ``train`` and ``test``; a folder with lists, tables
            or Parquet shards named after the parts; a ``split_zhou_*.json`` of CoOp, or the folder of one; a CSV or
            Parquet file; a Hub id (``id:part`` names one part). None is the embedded demo's.
        reading: how, and where what cannot be used is noted.
        demo: class names of the embedded data, and (image, label) pairs by part: "train", "val" or "test", perhaps
            followed by its size.

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
            f"there is no {source}. Expected a folder of images, a .csv, .parquet or split_zhou_*.json file, or a "
            f"Hub id."
        )
    else:
        parts = read_hub(source, reading)
    parts.skipped, parts.labels = reading.skipped, parts.labels or reading.names
    return parts


def _embedded(names: Sequence[str], images: Mapping[str, Sequence[tuple[Image.Image, int]]]) -> Parts:
    found: dict[str, list[Labelled]] = {}
    for name, pairs in images.items():
        part = PARTS[name.rstrip("0123456789")]
        found[part] = [Labelled(image, names[label], f"{name} {i}") for i, (image, label) in enumerate(pairs)]
    return Parts.of(found, list(names))


def _file(path: Path, reading: Reading) -> Parts:
    if path.suffix == ".json":
        return read_coop(path, reading)
    if path.suffix == ".csv" and (column := split_column(path)):
        raise DataError(
            f"{path} has a column {column!r}, which is not read: images to test on would be trained on. "
            f"Make a file of each part (train.csv, test.csv) and name their folder, or remove the column."
        )
    if path.suffix in (".csv", ".parquet"):
        return Parts(train=(read_csv if path.suffix == ".csv" else read_parquet)(path, reading))
    raise DataError(f"{path}: expected a folder of images, a .csv, .parquet or split_zhou_*.json file, or a Hub id.")


def _folder(root: Path, reading: Reading) -> Parts:
    for read_layout in reading.layouts:
        if (parts := read_layout(root, reading)) is not None:
            return parts
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
