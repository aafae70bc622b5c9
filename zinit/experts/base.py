"""What an expert is, and how one is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from zinit.experts import EXPERTS


class Expert(Protocol):
    """Writes text about images.

    Attributes:
        name: registered name.
        line: what stands before its text in a prompt, such as "Text in the picture".
        by_question: whether the text depends on the question; if not, an image is shown once for all its questions.
    """

    name: str
    line: str
    by_question: bool

    def __call__(self, images: Sequence[Image.Image], questions: Sequence[str] = ()) -> Sequence[str]:
        """One text for each image; empty if there is nothing to say.

        Args:
            images: in RGB.
            questions: one for each image, where the text depends on it.
        """
        ...


def make_expert(words: str, *, device: torch.device | str = "cpu") -> Expert:
    """The expert that a user means.

    Args:
        words: its name, and for some what belongs to it: "ocr", "detection:facebook/detr-resnet-50".
        device: for experts with a model.

    Raises:
        ConfigError: if there is none, what belongs to it is missing or wrong, or a package is not installed.
        BackboneError: if its model cannot be loaded.
    """
    name, _, argument = words.partition(":")
    return EXPERTS.get(name)(argument, device=device)
