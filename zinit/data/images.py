"""Images from files and memory: checked once, kept small, with errors that name the file.

Pixels are taken as the file stores them: an EXIF orientation is not applied, as torchvision and timm do not either, but
counted. (In TIFF files it is part of the format, and Pillow applies it.)
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from zinit.errors import DataError
from zinit.files import is_file, is_folder, is_hidden, is_lfs_pointer, parsing
from zinit.validation import OnBad, shown

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "GIF",
    "TIFF",
    "PPM",
)  # a reader of EPS would run a program
MAX_PIXELS = 100_000_000  # of one image; more is taken for a decompression bomb
MAX_RATIO = 50  # of its sides; a processor that scales the shorter one up makes a bomb of a longer strip
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what a whole file of these formats ends with
TAIL = 64  # bytes: behind the end there may be a few more
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
        DataError: naming the file, if it is missing, no image, truncated, too large, or a strip (see `MAX_RATIO`).
    """
    return read_with_orientation(source, max_pixels=max_pixels)[0]


def read_with_orientation(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, bool]:
    """See `read_image`; also whether the file's EXIF data ask for another orientation, which is not applied."""
    if isinstance(source, Image.Image):
        return _rgb(source), False
    with _opened(source, max_pixels) as image:
        image.load()
        return _rgb(image), image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)


def check_image(source: Path | Encoded, *, max_pixels: int = MAX_PIXELS) -> None:
    """Whether there is an image, by its header and its end. The pixels are decoded only where its end is not one.

    Args:
        source: a file, or an encoded image.
        max_pixels: more than this is refused.

    Raises:
        DataError: naming the file, if it is missing, no image, cut off, too large, or a strip (see `MAX_RATIO`).
    """
    with _opened(source, max_pixels) as image:
        end = ENDS.get(image.format or "")
        if end is None or end not in _tail(source):
            image.load()


def _tail(source: Path | Encoded) -> bytes:
    """The last bytes of a file."""
    if isinstance(source, Encoded):
        return source.read()[-TAIL:]
    with source.open("rb") as file:
        file.seek(max(0, os.path.getsize(source) - TAIL))
        return file.read()


@contextmanager
def _opened(source: Path | Encoded, max_pixels: int) -> Iterator[Image.Image]:
    """An image, its header read and its size checked, while inside."""
    if isinstance(source, Path) and not is_file(source):
        raise DataError(
            f"there is no image {source}." if not os.path.exists(source) else f"{source} is no regular file."
        )
    with parsing(f"{source} is damaged or truncated", DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warning of bombs: our limit decides
        with _open(source) as image:
            check_size(source, *image.size, max_pixels=max_pixels)
            yield image


def check_size(source: Path | Encoded, width: int, height: int, *, max_pixels: int = MAX_PIXELS) -> None:
    """Whether an image of this size can be worked with.

    Args:
        source: for the message.
        width: in pixels.
        height: in pixels.
        max_pixels: that are allowed.

    Raises:
        DataError: if it is too large, or a strip.
    """
    if width * height > max_pixels:
        raise DataError(
            f"{source} would unpack to {width} x {height} pixels, more than the {max_pixels:,} allowed. "
            f"Scale it down, or leave it out."
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(
            f"{source} would unpack to {width} x {height} pixels: one side is more than {MAX_RATIO} times as long as "
            f"the other. Cut it, or leave it out."
        )


def _open(source: Path | Encoded) -> Image.Image:
    """An image of one of our formats, its header read."""
    try:
        return Image.open(io.BytesIO(source.read()) if isinstance(source, Encoded) else source, formats=FORMATS)
    except UnidentifiedImageError as error:
        hint = ""
        if isinstance(source, Path) and is_lfs_pointer(source):
            hint = " It is a Git LFS pointer, not the image itself: fetch the file with 'git lfs pull'."
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise DataError(f"{source} is no image that can be read: it is none in {formats}.{hint}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{source} would unpack to too many pixels ({error}). Leave it out.") from error


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
        DataError: if it leaves the folder, or no file can have it.
    """
    path = (folder / relative).absolute()
    with parsing(f"{shown(relative)} is no path that a file can have", DataError):  # a zero byte, half a surrogate pair
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{relative!r} leaves the folder {folder}; paths in lists must stay inside it.")
    return path


def class_folders(
    root: Path, *, fewest: int = 2, left_out: Counter[str] | None = None
) -> tuple[list[str], list[tuple[Path, int]]]:
    """A folder with one sub-folder of images per class.

    Args:
        root: the folder.
        fewest: classes that there must be.
        left_out: where what is passed over is counted, by reason; see `image_files`.

    Returns:
        The sorted class names, and (file, class) pairs, sorted.

    Raises:
        DataError: if there is no such folder, it has too few classes, or a class has no image.
    """
    if not is_folder(root):
        raise DataError(f"there is no folder {root}.")
    left_out = Counter() if left_out is None else left_out
    entries = list(root.iterdir())
    names = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    if len(names) < fewest:
        least = {1: "one sub-folder", 2: "two sub-folders"}[fewest]
        raise DataError(f"{root}: expected at least {least}, one per class; found {names or 'none'}.")
    left_out["files_skipped_hidden"] += sum(is_hidden(entry.name) for entry in entries)
    left_out["files_skipped_outside_classes"] += sum(not is_hidden(e.name) and not e.is_dir() for e in entries)
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(names):
        files = image_files(root / name, left_out)
        if not files:
            raise DataError(f"{root / name} holds no image ({', '.join(SUFFIXES)}). Remove the folder, or fill it.")
        found += [(file, label) for file in files]
    return names, found


def image_files(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The images in a folder and below it, sorted: by their suffix, or by their first bytes under any other name.

    Args:
        folder: to look in.
        left_out: counts what is passed over: hidden files and folders (a folder counts once), links to folders, and
            what is no image.
    """
    found = []
    for place, folders, files in os.walk(folder):
        left_out["files_skipped_hidden"] += sum(map(is_hidden, [*folders, *files]))
        folders[:] = [name for name in folders if not is_hidden(name)]
        left_out["files_skipped_linked_folder"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        for path in (Path(place, name) for name in files if not is_hidden(name)):
            if is_file(path) and (path.suffix.lower() in SUFFIXES or _looks_like_image(path)):
                found.append(path)
            else:
                left_out["files_skipped_no_image"] += 1
    return sorted(found)


def _looks_like_image(path: Path) -> bool:
    try:
        with parsing(str(path), DataError), _open(path):
            return True
    except DataError:
        return False


class Images(Sequence[Tensor]):
    """Decoded, resized images as uint8 tensors (3, H, W).

    All are decoded once when this is made, so that a bad file shows at once and not an hour into a run.

    Args:
        sources: files or images in memory.
        prepare: brings an image to its final size (a pure function).
        on_bad: "error" stops at the first image that cannot be read; "skip" leaves it out and notes why.
        progress: called with the number of images read so far.
        without: digests of images to leave out; see ``digests``.

    Attributes:
        kept: positions in ``sources`` of what is here, ascending.
        skipped: {position: why}.
        digests: of each image that is here, of the pixels before ``prepare``: the same picture has the same digest
            whatever its file is called.
        repeated: positions of images that are among those to leave out.
        turned: how many of those here have an EXIF orientation, which is not applied.

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
        without: Collection[bytes] = (),
    ) -> None:
        self.sources, self.prepare = sources, prepare
        self.kept: list[int] = []
        self.skipped: dict[int, str] = {}
        self.digests: list[bytes] = []
        self.repeated: list[int] = []
        self.turned = 0
        self._decoded: list[Tensor] = []
        room = KEPT_BYTES
        for position, source in enumerate(sources):
            try:
                image, turned = read_with_orientation(source)
            except DataError as error:
                if on_bad == "error":
                    raise
                self.skipped[position] = str(error)
                continue
            progress(position + 1)
            digest = image_digest(image)
            if digest in without:
                self.repeated.append(position)
                continue
            self.kept.append(position)
            self.digests.append(digest)
            self.turned += turned
            decoded = self._to_tensor(image)
            room -= decoded.numel()
            if room >= 0:  # the first that does not fit ends it: `_decoded` holds the first of `kept`
                self._decoded.append(decoded)

    def _to_tensor(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(self.prepare(image), dtype=np.uint8).transpose(2, 0, 1).copy())

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index < len(self._decoded):
            return self._decoded[index]
        return self._to_tensor(read_image(self.sources[self.kept[index]]))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def content_digest(source: ImageSource) -> bytes:
    """Tells an image from every other by its file's bytes, which are not decoded; one in memory by its pixels.

    A folder, of a video's frames, is known by the names and bytes of its files.

    Raises:
        DataError: if there is no such file.
    """
    if isinstance(source, Image.Image):
        return image_digest(source)
    if isinstance(source, Encoded):
        return hashlib.sha256(source.read()).digest()
    if is_folder(source):
        frames = [(path.name.encode(), content_digest(path)) for path in sorted(source.iterdir()) if is_file(path)]
        return hashlib.sha256(repr(frames).encode()).digest()
    with parsing(f"{source} cannot be read", DataError), source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def image_digest(image: Image.Image) -> bytes:
    """Tells an RGB image from every other by its pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


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
