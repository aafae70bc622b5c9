"""Pictures by class, as few-shot tasks read them: class folders, CoOp's split files, Parquet files, Hub data sets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zinit.data import _looks_like_path, _read_parquet
from zinit.errors import ConfigError, DataError
from zinit.images import Encoded, Picture, class_folders, inside
from zinit.registry import did_you_mean

Labelled = tuple[Picture, int]
TEST_PARTS = ("test", "val", "validation", "valid")  # the first that is there is tested on


@dataclass(frozen=True, kw_only=True)
class ClassImages:
    """One source of pictures.

    Attributes:
        source: for messages.
        names: of the classes, by label.
        parts: (picture, label) pairs under "train" and one or more of `TEST_PARTS`, or under "all" where the source
            has no split.
    """

    source: str
    names: list[str]
    parts: dict[str, list[Labelled]]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def without(self, dropped: Sequence[str]) -> ClassImages:
        """The other classes, with labels counted anew from 0."""
        return self.relabelled([name for name in self.names if name not in dropped])

    def relabelled(self, names: Sequence[str]) -> ClassImages:
        """The same pictures with labels that index ``names``; pictures of other classes are left out."""
        index = {name: label for label, name in enumerate(names)}
        new = [index.get(name) for name in self.names]
        parts = {
            part: [(picture, label) for picture, old in pairs if (label := new[old]) is not None]
            for part, pairs in self.parts.items()
        }
        return ClassImages(source=self.source, names=list(names), parts=parts)

    def part(self, *names: str) -> list[Labelled]:
        """The first of these parts that is there; all pictures where the source has no split."""
        return next(self.parts[name] for name in ("all", *names) if name in self.parts)

    def split(self, seed: int) -> tuple[list[Labelled], list[Labelled]]:
        """What is trained and what is tested on.

        Where the source has no split of its own, half of each class (rounded down, but at least one) is tested on.

        Args:
            seed: of that half.
        """
        if "all" not in self.parts:
            return self.part("train"), self.part(*TEST_PARTS)
        generator = torch.Generator().manual_seed(seed)
        tested: set[int] = set()
        for label in range(len(self.names)):
            mine = [position for position, (_, other) in enumerate(self.parts["all"]) if other == label]
            order = torch.randperm(len(mine), generator=generator).tolist()
            tested |= {mine[chosen] for chosen in order[: max(1, len(mine) // 2)]}
        pairs = self.parts["all"]
        return [p for i, p in enumerate(pairs) if i not in tested], [p for i, p in enumerate(pairs) if i in tested]


def read_class_images(
    data: str | None, *, folder: str = ".", fields: Sequence[str] = ("image", "label")
) -> ClassImages:
    """Reads which pictures there are, not the pictures.

    Args:
        data: a folder with one sub-folder per class, or with such folders in ``train`` and ``test``; a
            ``split_zhou_*.json`` file of CoOp, or the folder of one; a Parquet file; a Hub id (``id:split`` names one
            split). None is the embedded demo's.
        folder: where the pictures of a split file are, seen from that file.
        fields: what a Parquet file or Hub data set calls picture and class.

    Raises:
        DataError: naming the source and what is wrong with it.
    """
    if data is None:
        from zinit import demo

        names, parts = demo.base_to_novel()  # pyright: ignore[reportAttributeAccessIssue]
        return ClassImages(source="the demo data", names=list(names), parts={k: list(v) for k, v in parts.items()})
    path = Path(data).expanduser()
    if path.is_dir():
        splits = sorted(path.glob("split_zhou_*.json"))
        if len(splits) > 1:
            raise DataError(f"{data} holds several split files, {', '.join(f.name for f in splits)}. Name one of them.")
        return _read_split(splits[0], folder) if splits else _read_folder(path)
    if path.is_file():
        if path.suffix == ".json":
            return _read_split(path, folder)
        if path.suffix == ".parquet":
            return _from_datasets(str(path), {"all": _read_parquet(path)}, fields)
        raise DataError(f"{path}: expected a folder of class folders, a split_zhou_*.json or a .parquet file.")
    if _looks_like_path(data):
        raise DataError(
            f"there is no {data}. Expected a folder with a folder per class, a split_zhou_*.json or .parquet file, "
            f"or a Hub id."
        )
    return _from_datasets(data, _read_hub(data), fields)


def drop_classes(source: ClassImages, dropped: Sequence[str]) -> ClassImages:
    """Without the classes of these names.

    Raises:
        ConfigError: if there is no such class.
    """
    for name in dropped:
        if name not in source.names:
            raise ConfigError(
                f"task.drop_classes: {source.source} has no class {name!r}.{did_you_mean(name, source.names)}"
            )
    return source.without(dropped)


def _read_folder(root: Path) -> ClassImages:
    inner = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if not ("train" in inner and inner <= {"train", *TEST_PARTS} and len(inner) > 1):
        names, found = class_folders(root)
        return ClassImages(source=str(root), names=names, parts={"all": list(found)})
    read = {part: class_folders(root / part) for part in sorted(inner)}
    names = sorted({name for found, _ in read.values() for name in found})
    parts = {
        part: ClassImages(source="", names=found, parts={part: list(pairs)}).relabelled(names).parts[part]
        for part, (found, pairs) in read.items()
    }
    return ClassImages(source=str(root), names=names, parts=parts)


def _read_split(path: Path, folder: str) -> ClassImages:
    """CoOp's format: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("train"), list) or "test" not in document:
        raise DataError(f'{path}: expected {{"train": [[path, label, class name], ...], "val": ..., "test": ...}}.')
    root = path.parent / folder
    if not root.is_dir():
        raise DataError(f"there is no folder {root} of pictures. Name it, seen from {path.name}: -o task.folder=NAME")
    names: dict[int, str] = {}
    parts: dict[str, list[Labelled]] = {}
    for part in ("train", "val", "test"):
        parts[part] = []
        for number, entry in enumerate(document.get(part) or [], start=1):
            if (
                not isinstance(entry, list)
                or [type(value) for value in entry] != [str, int, str]
                or not (entry[0] and entry[2].strip())
            ):
                raise DataError(f"{path}, {part}, entry {number}: expected [path, label, class name]; got {entry!r}.")
            file, label, name = entry
            if names.setdefault(label, name) != name:
                raise DataError(
                    f"{path}, {part}, entry {number}: label {label} is {name!r} here and {names[label]!r} before."
                )
            parts[part].append((inside(root, file), label))
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise DataError(f"{path}: several labels share the class name {twice[0]!r}. Give each class its own name.")
    order = {label: new for new, label in enumerate(sorted(names))}
    renumbered = {part: [(picture, order[label]) for picture, label in pairs] for part, pairs in parts.items()}
    return ClassImages(source=str(path), names=[names[label] for label in order], parts=renumbered)


def _read_hub(source: str) -> dict[str, Any]:
    from datasets import Dataset, load_dataset

    name, _, split = source.partition(":")
    try:
        found: Any = load_dataset(name, split=split or None)
    except Exception as error:  # datasets raises many kinds; all mean that there is nothing to read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"there is no {source} here, and the Hub did not give a data set of that name: {reason}"
        ) from error
    if isinstance(found, Dataset):
        return {"all": found}
    if len(found) == 1:
        return {"all": next(iter(found.values()))}
    if "train" not in found or not set(TEST_PARTS) & set(found):
        raise DataError(f"{source} has the splits {', '.join(found)}. Name one of them: {name}:{next(iter(found))}")
    return {part: found[part] for part in ("train", *TEST_PARTS) if part in found}


def _from_datasets(source: str, parts: dict[str, Any], fields: Sequence[str]) -> ClassImages:
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    image, label = fields
    names: list[str] | None = None
    labels: dict[str, list[Any]] = {}
    for part, rows in parts.items():
        for field in fields:
            if field not in rows.column_names:
                raise DataError(
                    f"{source} has no field {field!r}; it has {', '.join(rows.column_names)}. "
                    f"Name picture and class: -o task.fields={','.join(rows.column_names[:2])}"
                )
        feature = rows.features[label]
        labels[part] = list(rows[label])
        if isinstance(feature, ClassLabel):
            names = list(feature.names)
        elif not (isinstance(feature, Value) and "string" in feature.dtype):
            raise DataError(
                f"{source}: the field {label!r} holds {feature}; expected the names of the classes, which the text "
                f"tower reads. Name another field: -o task.fields={image},FIELD"
            )
        feature = rows.features[image]
        if not isinstance(feature, ImageFeature) and "bytes" not in (feature if isinstance(feature, dict) else {}):
            raise DataError(f"{source}: the field {image!r} holds {feature}; expected pictures.")
        parts[part] = rows.cast_column(image, ImageFeature(decode=False))
    if names is None:
        names = sorted({name for found in labels.values() for name in found if name})
        index = {name: number for number, name in enumerate(names)}
        labels = {part: [index.get(name) for name in found] for part, found in labels.items()}
    pairs: dict[str, list[Labelled]] = {}
    for part, found in labels.items():
        pairs[part] = []
        for row, number in enumerate(found):
            where = f"{source}, {part}, record {row + 1}" if part != "all" else f"{source}, record {row + 1}"
            if number is None or not 0 <= number < len(names):
                raise DataError(f"{where}: the field {label!r} names no class. Leave the record out.")
            read = functools.partial(_read_bytes, parts[part], row, image, where)
            pairs[part].append((Encoded(where, read), number))
    return ClassImages(source=source, names=names, parts=pairs)


def _read_bytes(rows: Any, row: int, field: str, where: str) -> bytes:
    data = (rows[row][field] or {}).get("bytes")
    if not data:  # a path alone could lead anywhere
        raise DataError(f"{where}: the field {field!r} holds no picture.")
    return data


def draw_shots(
    pairs: Iterable[Labelled], shots: int, classes: int, *, seed: int, usable: Callable[[Picture], bool]
) -> tuple[list[list[Picture]], list[Picture]]:
    """Up to ``shots`` pictures of each class, by chance.

    Args:
        pairs: (picture, label).
        shots: per class.
        classes: labels are below this.
        seed: of the draw.
        usable: asked of each picture that is drawn; another is drawn in place of one that is not.

    Returns:
        The pictures of each class, and those that were not usable.
    """
    pools: list[list[Picture]] = [[] for _ in range(classes)]
    for picture, label in pairs:
        pools[label].append(picture)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[list[Picture]] = [[] for _ in pools]
    refused: list[Picture] = []
    for pool, mine in zip(pools, chosen, strict=True):
        for position in torch.randperm(len(pool), generator=generator).tolist():
            if len(mine) == shots:
                break
            (mine if usable(pool[position]) else refused).append(pool[position])
    return chosen, refused


def read_split(
    data: str | None,
    held_out_data: str | None,
    *,
    train: bool,
    labels: list[str] | None,
    dropped: Sequence[str],
    folder: str,
    fields: Sequence[str],
    seed: int,
) -> tuple[list[str], list[Labelled], list[Labelled], dict[str, int]]:
    """Training and test pictures of a run.

    Args:
        data: see `read_class_images`.
        held_out_data: a source of its own for the test pictures; None takes them from ``data``.
        train: False leaves the training pictures out.
        labels: the only class names allowed, in label order; None takes those of the data.
        dropped: names of classes to leave out.
        folder: see `read_class_images`.
        fields: see `read_class_images`.
        seed: see `ClassImages.split`.

    Returns:
        Class names, training and test pictures, and how many were read, dropped with their class, and unused.

    Raises:
        DataError: if a source cannot be read or has other classes.
    """
    found: list[ClassImages] = []
    pictures = 0
    if train or held_out_data is None:
        whole = read_class_images(data, folder=folder, fields=fields)
        pictures += len(whole)
        found.append(drop_classes(whole, dropped))
    if held_out_data is not None:
        whole = read_class_images(held_out_data, folder=folder, fields=fields)
        pictures += len(whole)
        found.append(whole.without(dropped))
    names = found[0].names if labels is None else labels
    for one in found:
        unknown = [name for name in one.names if name not in names]
        if unknown:
            raise DataError(
                f"{one.source} has the classes {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}, which "
                f"are not among the {len(names)} of the run. Use data with the run's classes."
            )
    kept = [one.relabelled(names) for one in found]
    if held_out_data is None:
        training, tested = kept[0].split(seed)
    else:
        training, tested = (kept[0].part("train") if train else []), kept[-1].part(*TEST_PARTS)
    training = training if train else []
    counts = {"read": pictures, "dropped": pictures - sum(map(len, kept))}
    counts["unused"] = pictures - counts["dropped"] - len(training) - len(tested)
    return names, training, tested, counts
