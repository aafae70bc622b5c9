"""From an image to the square a vision tower takes: CLIP's plain way, and random crops for training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zinit.data import images
from zinit.data.images import ImageSource, image_digest, read_image, read_with_orientation

ASPECTS = (math.log(3 / 4), math.log(4 / 3))  # of random crops


def plain(image: Image.Image, size: int) -> Image.Image:
    """The shorter side scaled to ``size`` (bicubic), then the square in the middle, as CLIP does."""
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((int(size * width / shorter), int(size * height / shorter)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, smallest: float, draw: random.Random) -> Image.Image:
    """A random part of an image scaled to a square, mirrored half of the time, as CoOp does.

    Args:
        image: RGB.
        size: of the result.
        smallest: smallest part of the image's area, such as 0.08.
        draw: the random generator.
    """
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * draw.uniform(smallest, 1.0), math.exp(draw.uniform(*ASPECTS))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
            break
    else:  # too narrow for any of the aspects
        image = plain(image, size)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else image


class Views(Sequence[Tensor]):
    """Random crops of images as uint8 tensors (3, size, size): all images once, then all of them anew, and so on.

    A view is a pure function of (seed, image's position, number of the view).

    Args:
        sources: files or images in memory.
        size: of a crop.
        views: how many of each image.
        smallest: see `random_crop`.
        seed: of the crops.

    Attributes:
        digests: see `zinit.data.images.Images`.
        turned: likewise.
    """

    def __init__(self, sources: Sequence[ImageSource], *, size: int, views: int, smallest: float, seed: int) -> None:
        self.sources, self.size, self.views, self.smallest, self.seed = sources, size, views, smallest, seed
        room = images.KEPT_BYTES // (3 * size * size)
        self._made: dict[int, Tensor] = {}
        self.digests: list[bytes] = []
        self.turned = 0
        for position, source in enumerate(sources):
            image, turned = read_with_orientation(source)
            self.digests.append(image_digest(image))
            self.turned += turned
            for view in range(views):
                if len(self._made) < room:
                    self._made[view * len(sources) + position] = self._make(image, position, view)

    def _make(self, image: Image.Image, position: int, view: int) -> Tensor:
        crop = random_crop(image, self.size, self.smallest, random.Random(f"{self.seed} {position} {view}"))
        return torch.from_numpy(np.asarray(crop, dtype=np.uint8).transpose(2, 0, 1).copy())

    def __len__(self) -> int:
        return len(self.sources) * self.views

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index in self._made:
            return self._made[index]
        view, position = divmod(index, len(self.sources))
        return self._make(read_image(self.sources[position]), position, view)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
