"""What encoders share: a frozen tower, how its input is made, who it is."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, Features
from zinit.data.images import read_image
from zinit.errors import ConfigError
from zinit.models.identity import difference, identify

Prepare = Callable[[Sequence[Any]], Tensor]


def described(source: str | Path) -> dict[str, Any]:
    """What a folder's ``config.json`` says; nothing where it cannot be read: who loads the model says what is wrong."""
    try:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class TowerEncoder(Encoder):
    """A frozen model of a library.

    Args:
        tower: the model; it is frozen.
        prepare: what the encoder has read (RGB images, sounds) to a batch; None if the model came without a processor.
        processing: the processor's settings, as text.
        source: where it came from; empty for a module.
        bgr: images are given with their channels in reverse.
    """

    processor: Prepare | None

    def __init__(
        self,
        tower: nn.Module,
        prepare: Prepare | None,
        *,
        processing: str = "",
        source: str = "",
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.processing = processing
        self.tower = tower.requires_grad_(False).eval()
        self.bgr, self.processor = bgr, prepare
        self.identity = {"source": source, "modality": self.modality, "bgr": bgr, **identify(tower)}

    @torch.no_grad()
    def forward(self, pixels: Tensor, layers: int = 0) -> Features:
        """See `zinit.adapter.encoding.Encoder`."""
        return self.features(pixels, self.chosen(layers))

    @abstractmethod
    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """Features of pixels; ``layers`` are numbers from 1."""

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """How it differs from a recorded encoder; where it lies does not count."""
        if self.bgr != identity.get("bgr", False):
            return f"bgr is {self.bgr}, expected {identity.get('bgr', False)}"
        return difference(identity, self.identity)


class ImageEncoder(TowerEncoder):
    """An image tower: RGB images to (B, 3, H, W)."""

    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Image files and images to pixels.

        Raises:
            ConfigError: if the model came without a processor.
            DataError: if a file is no image.
        """
        if self.processor is None:
            raise ConfigError(
                f"the encoder {self.identity['source'] or type(self.tower).__name__} came without an image processor "
                f"(no preprocessor_config.json): give pixels (batch, 3, height, width) instead of images."
            )
        images = [read_image(item) for item in items]
        if self.bgr:
            images = [Image.merge("RGB", image.split()[::-1]) for image in images]
        return self.processor(images)
