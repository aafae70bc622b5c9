"""The settings of the task vtab; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from zinit.config import JsonConfig
from zinit.validation import CommaSeparated, Name, NoneIsAWord, NonNegativeInt, OnBad, PositiveFloat, Rate, Size, Words

Split = Literal["train800val200", "train800"]
Columns = Annotated[tuple[Name, Name], CommaSeparated, Words("a list of two names: the columns of image and label")]


@dataclass(frozen=True, kw_only=True)
class VTABConfig(JsonConfig):
    """What the task does with its data.

    Args:
        dataset: which task of a folder that holds several (``cifar``), or which embedded data (``digits``, the
            default, ``textures``, ``counts``).
        split: "train800val200" trains on everything but the test images, which are evaluated. "train800" evaluates
            on the validation part, for choosing hyper-parameters; test images are not touched.
        held_out_data: a source of its own for what is evaluated: its part for that, or all of it if it has no parts.
        on_bad: "error" stops at the first image or line that cannot be used; "skip" leaves it out and counts it.
        fields: columns of image and label in CSV, Parquet and Hub data; None tries the usual names.
        interpolation: of the resize: "bicubic" (FacT) or "bilinear" (VPT).
        normalisation: "imagenet" (VPT) or the "model"'s own mean and deviation in pretraining; "none" leaves [0, 1].
        image_size: pixels a side; None is the model's own. Position embeddings are resampled to another.
        head_init: where the head starts: "normal", N(0, 0.02^2), or "logistic-regression", the classifier that the
            frozen features give, so that with closed gates training starts at the frozen model with its own best
            linear head (linear probing before tuning: Kumar et al., ICLR 2022); VTAB-1k's protocols do not.
        head_C: inverse strength of that regression's L2 penalty, on standardised features.
        drift: held-out images to measure by how much their features moved; 0 measures nothing.
        drop_path: rate of stochastic depth of the last layer, growing linearly from 0 at the first (FacT: 0.1).
    """

    dataset: str | None = None
    split: Split = "train800val200"
    held_out_data: str | None = None
    on_bad: OnBad = "error"
    fields: Columns | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    normalisation: Annotated[Literal["imagenet", "model", "none"], NoneIsAWord] = "imagenet"
    image_size: Annotated[Size, Words("a whole number of at least 1 (pixels)")] | None = None
    head_init: Literal["normal", "logistic-regression"] = "normal"
    head_C: PositiveFloat = 1.0
    drift: NonNegativeInt = 0
    drop_path: Rate = 0.0
