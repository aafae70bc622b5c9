"""Which captions are trained on, and which images are held out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zinit.data.hold_out import hold_out
from zinit.data.images import Encoded, content_digest
from zinit.data.records import count_sources, most_unused
from zinit.errors import ConfigError, DataError
from zinit.tasks.base import DataInputs
from zinit.tasks.caption.config import CaptionConfig
from zinit.tasks.caption.records import Captioned, CaptionReading


def split_captions(
    inputs: DataInputs, config: CaptionConfig
) -> tuple[list[Captioned], list[Captioned], dict[str, Any]]:
    """Training and held-out images: none is in both, under whatever name.

    Data that say which part an image is of are divided so: "train" and the part ``config.split``. Others are held out
    by the seed.

    Returns:
        Both parts, and counts: of images, and of captions, what was read is ``train`` + ``held_out`` + ``not_used``
        + what was skipped.
    """
    if not inputs.sources and (inputs.train or config.held_out_data is None):
        raise ConfigError("the task caption has no data of its own. Name some: --data FILE_OR_FOLDER")
    reading = CaptionReading(on_bad=config.on_bad, fields=config.fields, folder=config.folder)
    read_train = inputs.train or config.held_out_data is None
    by_source = [reading.read(source) for source in inputs.sources] if read_train else []
    every = list(itertools.chain.from_iterable(by_source))
    if config.held_out_data is not None:
        own = reading.read(config.held_out_data)
        held_out = _of_part(own, config.split, config.held_out_data) if _has_parts(own) else own
        training = [image for image in every if image.part in ("train", "")]
        every += own
    elif _has_parts(every):
        training = [image for image in every if image.part == "train"]
        held_out = _of_part(every, config.split, ", ".join(inputs.sources))
    else:
        training, held_out = hold_out(every, config.held_out, inputs.seed, ", ".join(inputs.sources), "image")
    training = training if inputs.train else []
    clean = _without(training, held_out)
    counts: dict[str, Any] = {**reading.counts, **count_sources(by_source)}
    sizes = (("images", lambda part: len(part)), ("captions", lambda part: sum(len(each.captions) for each in part)))
    for what, size in sizes:
        counts[f"{what}_train"], counts[f"{what}_held_out"] = size(clean), size(held_out)
        counts[f"{what}_train_skipped_also_held_out"] = size(training) - size(clean)
        counts[f"{what}_not_used"] = size(every) - size(training) - size(held_out)
    counts |= most_unused(reading.unused)
    if _has_parts(held_out):
        counts["held_out_part"] = config.split
    return clean, held_out, counts | ({"reasons": reading.reasons} if reading.reasons else {})


def _without(training: Sequence[Captioned], held_out: Sequence[Captioned]) -> list[Captioned]:
    """The training images whose content is not that of a held-out one. Only files of like size are read."""
    sizes = {_size(image.image) for image in held_out} if training else set()
    alike = [image for image in training if _size(image.image) in sizes]
    if not alike:
        return list(training)
    tested = {content_digest(image.image) for image in held_out}
    same = {id(image) for image in alike if content_digest(image.image) in tested}
    return [image for image in training if id(image) not in same]


def _size(image: Path | Encoded) -> int:
    return image.stat().st_size if isinstance(image, Path) else len(image.read())


def _has_parts(images: Sequence[Captioned]) -> bool:
    return any(image.part for image in images)


def _of_part(images: Sequence[Captioned], part: str, name: str) -> list[Captioned]:
    found = [image for image in images if image.part == part]
    if not found:
        there = ", ".join(sorted({image.part or "none" for image in images}))
        raise DataError(f"{name} has no image of the part {part!r}; it has {there}. Choose: -o task.split=val or test")
    return found
