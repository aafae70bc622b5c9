"""Labelled images from any source: folders, lists, tables, the Hub, or the embedded demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from zinit.data.images import class_folders
from zinit.data.labelled.lists import read_coop, read_list
from zinit.data.labelled.parts import Labelled, Parts, Reading
from zinit.data.labelled.records import PARTS, read_csv, read_hub, read_parquet, read_shards, split_column
from zinit.errors import DataError
from zinit.files import is_file, is_folder, is_hidden, local_path

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
    elif is_folder(path := local_path(source)):
        parts = _folder(path, reading)
    elif is_file(path):
        parts = _file(path, reading)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in SUFFIXES:
        raise DataError(
            f"there is no {source}. Expected a folder of images, a .csv, .parquet or split_zhou_*.json file, or a "
            f"Hub id."
        )
    else:
        parts = read_hub(source, reading)
    parts.skipped, parts.labels = reading.skipped, parts.labels or reading.names
    parts.left_out = +reading.left_out
    return parts


def _embedded(names: Sequence[str], images: Mapping[str, Sequence[tuple[Image.Image, int]]]) -> Parts:
    found: dict[str, list[Labelled]] = {}
    for name, pairs in images.items():
        part = PARTS[name.rstrip("0123456789")]
        found[part] = [Labelled(image, names[label], f"{name} {i}") for i, (image, label) in enumerate(pairs)]
    parts = Parts.of(found, list(names))
    parts.published = True
    return parts


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
    splits = sorted(file for file in root.glob("split_zhou_*.json") if is_file(file))
    if len(splits) > 1:
        raise DataError(f"{root} holds several split files, {', '.join(f.name for f in splits)}. Name one of them.")
    if splits:
        return read_coop(splits[0], reading)
    for suffix, read in ((".txt", read_list), (".csv", read_csv)):
        files = _of_parts({name: root / f"{name}{suffix}" for name in PARTS if is_file(root / f"{name}{suffix}")})
        if "train" in files:
            return Parts.of({part: read(file, reading) for part, file in files.items()})
    folders = _of_parts({name: root / name for name in PARTS if is_folder(root / name)})
    if "train" in folders and len(folders) > 1:
        beside = [entry.name for entry in root.iterdir() if entry not in folders.values()]
        reading.left_out["files_skipped_hidden"] += sum(map(is_hidden, beside))
        reading.left_out["files_skipped_outside_parts"] += sum(not is_hidden(name) for name in beside)
        fewest = {part: reading.fewest if part == "train" else 1 for part in folders}
        found = {part: _classes(folder, reading, fewest[part]) for part, folder in folders.items()}
        return Parts.of({part: examples for part, (_, examples) in found.items()}, found["train"][0])
    if parquet := _parquet_files(root):
        return read_shards(root, parquet, reading)
    labels, examples = _classes(root, reading, reading.fewest)
    return Parts(train=examples, labels=labels)


def _of_parts(there: Mapping[str, Path]) -> dict[str, Path]:
    """{part: its file or folder}, of those that are there by name.

    Raises:
        DataError: if two are of one part.
    """
    found: dict[str, Path] = {}
    for name, path in there.items():
        if (first := found.setdefault(PARTS[name], path)) is not path:
            raise DataError(f"{path.parent} holds both {first.name} and {path.name}, which are one part. Keep one.")
    return found


def _parquet_files(root: Path) -> list[Path]:
    files = (file for file in root.rglob("*.parquet") if not any(map(is_hidden, file.relative_to(root).parts)))
    return sorted(file for file in files if is_file(file))


def _classes(folder: Path, reading: Reading, fewest: int) -> tuple[list[str], list[Labelled]]:
    labels, found = class_folders(folder, fewest=fewest, left_out=reading.left_out)
    return labels, [Labelled(file, labels[label]) for file, label in found]
