"""The settings of the task base-to-novel; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic import BeforeValidator

from zinit.config import JsonConfig
from zinit.errors import ConfigError
from zinit.validation import CommaSeparated, Name, Names, OnBad, PositiveInt, Seed, Words, shown

Columns = Annotated[tuple[Name, Name], CommaSeparated, Words("a list of two names: the columns of image and class")]

Template = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Words("text, or a list of texts, such as 'a photo of a {}.'"),
]


@dataclass(frozen=True, kw_only=True)
class BaseToNovelConfig(JsonConfig):
    """What the task does with its data.

    Args:
        shots: training images per base class, drawn by the run's seed.
        template: what the text tower reads, with ``{}`` for the class; the features of several are averaged.
        drop_classes: names of classes to leave out (Caltech101: BACKGROUND_Google and Faces_easy).
        folder: where the images of a split_zhou_*.json file are, seen from that file.
        fields: what CSV, Parquet and Hub data call image and class; None tries the usual names.
        views: 1 trains on the plain images; more make so many random crops of each, all of them once per epoch.
        crop_scale: smallest part of an image's area that a crop covers.
        few: whether a class with fewer images than shots is an error, or all it has are used.
        on_bad: whether an entry or image that cannot be read is an error, or skipped and counted (in training
            another image is drawn instead).
        split_seed: of the half of each class that is tested on, where the data has no test part. Not the run's seed:
            all runs are tested on the same images.
        held_out_data: a source of its own for the test images instead.
    """

    shots: PositiveInt = 16
    template: Template = ("a photo of a {}.",)
    drop_classes: Names = ()
    folder: str = "."
    fields: Columns | None = None
    views: PositiveInt = 1
    crop_scale: Annotated[float, Gt(0), Le(1), Words("a number above 0 and of at most 1")] = 0.08
    few: Literal["error", "use_all"] = "error"
    on_bad: OnBad = "error"
    split_seed: Seed = 0
    held_out_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.template or not all(text.count("{}") == 1 for text in self.template):
            raise ConfigError(f"template must hold {{}} once, for the class; got {shown(self.template)}.")
