"""The settings of the encoder of images in a run; nothing heavy is imported with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zinit.config import JsonConfig
from zinit.validation import Folder, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(JsonConfig):
    """What turns images into features, for adapters with a context source.

    Args:
        source: folder, name or Hub id of an image model; None is the demo's, or the one of the run that is loaded.
        revision: of it on the Hub.
        bgr: give it images with their channels in reverse, as OpenCV reads them.
        cache: folder of the features; None is one in the user's cache (``XDG_CACHE_HOME``).
        cache_limit: most gigabytes that the features of a run may take.
    """

    called: ClassVar[str] = "encoder"

    source: str | None = None
    revision: str | None = None
    bgr: bool = False
    cache: Folder | None = None
    cache_limit: PositiveFloat = 20.0
