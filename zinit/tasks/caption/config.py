"""The settings of the task caption; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from zinit.tasks.settings import TextConfig
from zinit.validation import CommaSeparated, Folder, Name, OnBad, PositiveInt, Words

Fields = Annotated[
    tuple[Name, Name], CommaSeparated, Words("a list of two names, the fields of an image and of its captions")
]


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(TextConfig):
    """What the task does with its data.

    Args:
        instruction: what the model is told, in Alpaca's template without input. (The paper's demo: "Generate caption
            of this image :"; I#73: "Generate caption for this image".)
        split: the held-out part of data that have parts: Karpathy's split of COCO has "val" and "test".
        held_out: images kept from training for evaluation where the data have no parts, at most a tenth of them.
        held_out_data: a source of its own for the held-out images instead.
        fields: what records call image and captions; None tries the usual names.
        folder: where the images are, seen from the data's file; an absolute path will do.
        on_bad: what to do with an image that is missing or cannot be read, or a caption that is no text: "error" or
            "skip" (which is counted).
        images: False trains and asks without the images, which are counted: what captions alone can teach.
        tokens: what the metrics take for words: "ptb" (English, as in published figures), "whitespace" or
            "characters".
        meteor: also METEOR, which needs Java and the extra ``zinit[meteor]``.
        max_new_tokens: longest generated caption.
    """

    instruction: Name = "Generate caption of this image"
    split: Literal["val", "test"] = "test"
    held_out: PositiveInt = 200
    held_out_data: str | None = None
    fields: Fields | None = None
    folder: Folder = "."
    on_bad: OnBad = "error"
    images: bool = True
    tokens: Literal["ptb", "whitespace", "characters"] = "ptb"
    meteor: bool = False
    max_new_tokens: PositiveInt = 64
