"""Frames of a video, one by one, by an image model: ``frames:openai/clip-vit-large-patch14``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features, load_feature_encoder
from zinit.data.images import SUFFIXES, check_size, read_image
from zinit.encoders.base import TowerEncoder
from zinit.encoders.senses import named
from zinit.errors import ConfigError, DataError, install_extra
from zinit.files import is_file, is_folder, is_hidden, parsing

SPACED = 8  # frames of a video
ANIMATED = (".gif", ".webp", ".png")
MOST_FRAMES = 100_000


class FramesEncoder(TowerEncoder):
    """An image encoder on equally spaced frames: tokens of all frames, one after the other; means of their vectors.

    Args:
        of: encodes each frame.
        source: where it came from.
    """

    modality = "video"
    ready = ("batch", "frames", "3", "height", "width")

    def __init__(self, of: Encoder, *, source: str = "") -> None:
        how = f"{SPACED} frames, {of.processing}"
        super().__init__(of, None, source=source, processing=how, bgr=bool(of.identity.get("bgr")))
        self.of = of
        self.depth, self.layer_width, self.width = of.depth, of.layer_width, of.width

    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Videos to (B, T, 3, H, W); a video with fewer frames shows some again.

        Raises:
            DataError: if an item is no video.
        """
        return torch.stack([self.of.prepare(read_frames(item, SPACED)) for item in items])

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """Of (B, T, 3, H, W); ``layers`` only says how many."""
        found = self.of(pixels.flatten(0, 1), len(layers))
        videos, frames = pixels.shape[:2]

        def mean(vectors: Tensor) -> Tensor:
            return vectors.unflatten(0, (videos, frames)).mean(1)

        tokens = None if found.tokens is None else found.tokens.unflatten(0, (videos, frames)).flatten(1, 2)
        pooled = None if found.pooled is None else mean(found.pooled)
        return Features(tokens, pooled, tuple(map(mean, found.layers)))


def read_frames(source: Any, count: int) -> list[Image.Image]:
    """So many frames of a video, equally spaced, the first and the last included.

    Args:
        source: a folder of images in the order of their names, a list of images, an animated GIF, WebP or PNG, or a
            video file, which takes the package ``av``.
        count: of the frames; a shorter video shows some again.

    Raises:
        DataError: if it is none.
        ConfigError: if a video file is given, and ``av`` is not installed.
    """
    if isinstance(source, list | tuple):
        frames: list[Any] = list(source)
    elif is_folder(source):
        frames = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in SUFFIXES and not is_hidden(p.name))
    elif not is_file(source):
        raise DataError(f"there is no video {source}.")
    elif Path(source).suffix.lower() in ANIMATED:
        return _animated(Path(source), count)
    else:
        return _decoded(Path(source), count)
    if not frames:
        raise DataError(f"{source} holds no frames.")
    return [read_image(frames[place]) for place in spaced(len(frames), count)]


def spaced(length: int, count: int) -> list[int]:
    """The places of so many frames among ``length``, the first and the last included."""
    return [round(place * (length - 1) / max(1, count - 1)) for place in range(count)]


def _animated(path: Path, count: int) -> list[Image.Image]:
    found = []
    formats = [suffix[1:].upper() for suffix in ANIMATED]
    with (
        parsing(f"{path} is no animated image that can be read", DataError),
        Image.open(path, formats=formats) as image,
    ):
        check_size(path, *image.size)
        for place in spaced(getattr(image, "n_frames", 1), count):
            image.seek(place)
            found.append(image.convert("RGB"))
    return found


def _decoded(path: Path, count: int) -> list[Image.Image]:
    try:
        library: Any = import_module("av")
    except ImportError as error:
        raise ConfigError(
            f"{path} is read by the package av. {install_extra('video')} Or give a folder of frames."
        ) from error
    with parsing(f"{path} is no video that can be read", DataError), library.open(str(path)) as video:
        total = sum(1 for _ in video.decode(video=0))
        if not 0 < total <= MOST_FRAMES:
            raise DataError(f"{path} has {total} frames; expected 1 to {MOST_FRAMES}.")
    wanted, found = spaced(total, count), {}
    with library.open(str(path)) as video:
        for number, frame in enumerate(video.decode(video=0)):
            if number in wanted:
                check_size(path, frame.width, frame.height)
                found[number] = frame.to_image()
    return [found[number] for number in wanted]


class FramesEncoders(EncoderLibrary):
    """The library."""

    def knows(self, source: str) -> bool:
        """``frames:IMAGE_MODEL``."""
        return source.startswith("frames:")

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """None: a module of images is taken for an encoder of images."""
        return None

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`."""
        return FramesEncoder(
            load_feature_encoder(named(source, "frames"), revision=revision, bgr=bgr), source=str(source)
        )


FRAMES = FramesEncoders()
