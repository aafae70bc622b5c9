"""Features of images on disk: a frozen encoder runs once per image, then never.

Files are safetensors and only ever added. An image is known by its content, a folder of features by the encoder and by
what of its output is kept, so that runs, processes and data sets share what they can.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinit.adapter.encoding import Encoder, Features, by_sample, encode
from zinit.adapter.sources import ContextSource
from zinit.data.images import ImageSource
from zinit.errors import ConfigError, DataError
from zinit.files import local_path, parsing, write_atomically

IMAGES_PER_PASS = 32
IMAGES_PER_FILE = 1024
GIGABYTE = 10**9
KINDS = ("tokens", "pooled", "layers")


def cache_root(folder: str | None = None) -> Path:
    """Where features lie: a folder of the user's choice, or one in the user's cache (``XDG_CACHE_HOME``)."""
    if folder is not None:
        return local_path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zinit" / "features"


class FeatureCache:
    """Features of images for one context source, in files that are mapped into memory.

    Args:
        encoder: makes them.
        source: says what of them it takes.
        root: folder of all features, see `cache_root`.
        limit: most gigabytes that the features of a run may take.

    Attributes:
        retrieval: changes a batch's features before the adapter sees them; None leaves them.
    """

    retrieval: Callable[[Features], Features] | None = None

    def __init__(self, encoder: Encoder, source: ContextSource, *, root: Path, limit: float) -> None:
        self.encoder, self.kinds, self.layers, self.limit = encoder, source.takes, source.layers, limit
        who = {name: value for name, value in encoder.identity.items() if name != "source"}
        how = {"processing": encoder.processing, "kinds": self.kinds, "layers": self.layers}
        key = json.dumps({"encoder": who, **how}, sort_keys=True)
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        self._places: dict[bytes, tuple[str, int]] = {}
        self._mapped: dict[str, dict[str, Tensor]] = {}
        self._find()

    def __getstate__(self) -> dict[str, Any]:
        # Processes that prepare batches map the files themselves.
        return {**vars(self), "_mapped": {}, "encoder": None, "retrieval": None}

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of which there are no features yet, sorted."""
        return sorted({digest for digest in digests if digest not in self._places})

    def fill(
        self,
        images: Mapping[bytes, ImageSource],
        *,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int, int], None] = lambda done, of: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Encodes this process's share of what is missing. `refresh` afterwards sees what the others have made.

        Args:
            images: by digest.
            rank: of this process.
            world: number of processes.
            progress: called with the images done by this process, and their number.
            tell: gets the size in words, before anything is made.

        Raises:
            ConfigError: if the features would take more than the limit, or the disk has no room.
            DataError: if an image cannot be decoded.
        """
        missing = self.missing(images)
        if not missing:
            return
        self._check_size(self._encode([images[missing[0]]]), images, len(missing), tell)
        mine, done = missing[rank::world], 0
        for start in range(0, len(mine), IMAGES_PER_FILE):
            digests = mine[start : start + IMAGES_PER_FILE]
            passes = []
            for chosen in _batches(digests, IMAGES_PER_PASS):
                passes.append(self._encode([images[digest] for digest in chosen]))
                done += len(chosen)
                progress(done, len(mine))
            self._write(digests, {kind: torch.cat([made[kind] for made in passes]) for kind in self.kinds})
        self.refresh()

    def _encode(self, images: Sequence[ImageSource]) -> dict[str, Tensor]:
        try:
            made = encode(self.encoder, images, layers=self.layers)
        except DataError as error:
            raise DataError(f"{error} Leave it out of the data, and run the same command again.") from error
        stacked = torch.stack(made.layers, dim=1) if made.layers else None
        kinds = {"tokens": made.tokens, "pooled": made.pooled, "layers": stacked}
        return {kind: tensor.cpu() for kind, tensor in kinds.items() if kind in self.kinds and tensor is not None}

    def _check_size(
        self, one: Mapping[str, Tensor], images: Mapping[bytes, ImageSource], missing: int, tell: Callable[[str], None]
    ) -> None:
        each = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
        size = each * len(images) / GIGABYTE
        shapes = ", ".join(f"{kind} {tuple(tensor.shape[1:])}" for kind, tensor in one.items())
        text = f"features of {len(images)} images take {size:.3g} GB ({shapes})"
        if size > self.limit:
            raise ConfigError(
                f"{text}, more than encoder.cache_limit={self.limit:g}. Raise it, take fewer images, or a context "
                f"source that takes less, such as projected-image."
            )
        self._check_folder(each * missing, text)
        tell(f"{text}; {missing} of them are encoded now, into {self.folder}")

    def _check_folder(self, size: int, text: str) -> None:
        """The folder can be written and has room: said before the encoder runs for hours."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                free = shutil.disk_usage(self.folder).free
        if size > free:
            raise ConfigError(
                f"{text}, and {self.folder} has room for {free / GIGABYTE:.3g} GB. Make room, or name another folder: "
                f"-o encoder.cache=FOLDER."
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"features cannot be written to {self.folder}: {error.strerror or error}. Make room, or name another "
                f"folder: -o encoder.cache=FOLDER."
            ) from error

    def _write(self, digests: Sequence[bytes], tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        stored = {"digests": torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)}
        name = hashlib.sha256(b"".join(digests)).hexdigest()[:32]
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            data = save(stored | {kind: tensor.contiguous() for kind, tensor in tensors.items()})
            write_atomically(self.folder / f"{name}.safetensors", data)

    def refresh(self) -> None:
        """Finds what other processes have written."""
        self._find()

    def _find(self) -> None:
        known = {name for name, _ in self._places.values()}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else ():
            if path.name not in known and not path.name.startswith("."):
                for row, digest in enumerate(self._digests(path)):
                    self._places.setdefault(digest, (path.name, row))

    def _digests(self, path: Path) -> list[bytes]:
        """The images of a file; none of one that is damaged: they are encoded again."""
        from safetensors import safe_open

        try:
            with parsing(f"{path} is damaged", DataError), safe_open(path, "pt") as file:
                counts = {file.get_slice(kind).get_shape()[0] for kind in self.kinds}
                digests = file.get_tensor("digests")
                whole = set(file.keys()) == {"digests", *self.kinds} and digests.shape == (*counts, 32)
                return [bytes(row) for row in digests.numpy()] if whole else []
        except DataError:
            return []

    def features(self, samples: Sequence[Sequence[bytes]]) -> Features:
        """Features of samples with none, one or several images each.

        Args:
            samples: the digests of each sample's images.

        Raises:
            ConfigError: if an image has not been encoded.
        """
        digests = [digest for own in samples for digest in own]
        if left := self.missing(digests):
            raise ConfigError(f"{len(left)} images have no features yet: fill the cache first.")
        counts = [len(own) for own in samples]
        places = [self._places[digest] for digest in digests or [next(iter(self._places))]]  # or one, for its shape
        made = {kind: torch.stack([self._file(name)[kind][row] for name, row in places]) for kind in self.kinds}
        made = {kind: tensor[: len(digests)] for kind, tensor in made.items()}
        layers = made["layers"].unbind(1) if "layers" in made else ()
        return by_sample(Features(made.get("tokens"), made.get("pooled"), layers), counts)

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._mapped:
            from safetensors.torch import load_file

            with parsing(f"{self.folder / name} cannot be read", DataError, "Run the same command again."):
                self._mapped[name] = load_file(self.folder / name)
        return self._mapped[name]


def _batches(items: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    return (items[start : start + size] for start in range(0, len(items), size))
