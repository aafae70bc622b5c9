"""Images from files and memory: checked once, kept small, with errors that name the file."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zinit.errors import DataError, first_line
from zinit.files import is_lfs_pointer
from zinit.validation import OnBad

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 100_000_000  # of one image; more is taken for a decompression bomb
THUMBNAIL, THUMBNAIL_START = 96, "data:image/jpeg;base64,"  # pixels a side, and how a page holds it
KEPT_BYTES = 4 * 2**30  # decoded images held in memory; those beyond it are read again each time


@dataclass(frozen=True)
class Encoded:
    """An image file inside a data set instead of a folder.

    Args:
        name: for messages.
        read: gives the file's bytes.
    """

    name: str
    read: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


ImageSource = Path | Encoded | Image.Image
Prepare = Callable[[Image.Image], Image.Image]


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A whole image in RGB: greyscale, palette and transparent ones are converted (transparency onto white).

    Args:
        source: a file, an encoded image, or one in memory.
        max_pixels: more than this is refused before anything is decoded.

    Raises:
        DataError: naming the file, if it is missing, no image, truncated, or too large.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning of bombs: our limit decides
            with Image.open(io.BytesIO(source.read()) if isinstance(source, Encoded) else source) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"{source} would unpack to {width} x {height} pixels, more than the {max_pixels:,} allowed. "
                        f"Scale it down, or leave it out."
                    )
                image.load()
                return _rgb(image)
    except FileNotFoundError as error:
        raise DataError(f"there is no image {source}.") from error
    except UnidentifiedImageError as error:
        hint = ""
        if isinstance(source, Path) and is_lfs_pointer(source):
            hint = " It is a Git LFS pointer, not the image itself: fetch the file with 'git lfs pull'."
        raise DataError(f"{source} is no image that can be read.{hint}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{source} would unpack to too many pixels ({error}). Leave it out.") from error
    except (OSError, SyntaxError, ValueError, IndexError, MemoryError, EOFError) as error:
        raise DataError(f"{source} is damaged or truncated: {first_line(error)}.") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16 bits: Pillow would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0.0)))
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def inside(folder: Path, relative: str) -> Path:
    """A path that a list file names, which must stay in the list's folder.

    Raises:
        DataError: if it leaves the folder.
    """
    path = (folder / relative).absolute()
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{relative!r} leaves the folder {folder}; paths in lists must stay inside it.")
    return path


def class_folders(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """A folder with one sub-folder of images per class.

    Returns:
        The sorted class names, and (file, class) pairs, sorted.

    Raises:
        DataError: if there is no such folder, it has fewer than two classes, or a class has no image.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{root}: expected at least two sub-folders, one per class; found {names or 'none'}.")
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(names):
        files = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{root / name} holds no image ({', '.join(SUFFIXES)}). Remove the folder, or fill it.")
        found += [(file, label) for file in files]
    return names, found


class Images(Sequence[Tensor]):
    """Decoded, resized images as uint8 tensors (3, H, W).

    All are decoded once when this is made, so that a bad file shows at once and not an hour into a run.

    Args:
        sources: files or images in memory.
        prepare: brings an image to its final size (a pure function).
        on_bad: "error" stops at the first image that cannot be read; "skip" leaves it out and notes why.
        progress: called with the number of images read so far.

    Attributes:
        kept: positions in ``sources`` of what is here, ascending.
        skipped: {position: why}.

    Raises:
        DataError: naming the image, unless it is to be skipped.
    """

    def __init__(
        self,
        sources: Sequence[ImageSource],
        prepare: Prepare,
        *,
        on_bad: OnBad = "error",
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.sources, self.prepare = sources, prepare
        self.kept: list[int] = []
        self.skipped: dict[int, str] = {}
        self._decoded: list[Tensor] = []
        room = KEPT_BYTES
        for position, source in enumerate(sources):
            try:
                decoded = self._decode(source)
            except DataError as error:
                if on_bad == "error":
                    raise
                self.skipped[position] = str(error)
                continue
            self.kept.append(position)
            if room >= decoded.numel():
                room -= decoded.numel()
                self._decoded.append(decoded)
            progress(position + 1)

    def _decode(self, source: ImageSource) -> Tensor:
        image = self.prepare(read_image(source))
        return torch.from_numpy(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1).copy())

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index < len(self._decoded):
            return self._decoded[index]
        return self._decode(self.sources[self.kept[index]])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) to float32: divided by 255, then by channel (x - mean) / std."""
    mean_, std_ = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean_) / std_


def thumbnail(image: Tensor) -> str:
    """A small copy of an image (3, H, W), uint8, as text for a page: a ``data:`` address of a JPEG.

    Args:
        image: as `Images` holds it.
    """
    small, file = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=90)
    return f"{THUMBNAIL_START}{base64.b64encode(file.getvalue()).decode()}"
