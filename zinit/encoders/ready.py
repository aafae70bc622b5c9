"""Features that something else has made, as an encoder: ``vectors:1024`` takes files of vectors of that width.

The way for depth, points, IMU, and encoders that zinit does not ship: every sample names a file instead of an image.
``vectors:1024`` makes one vector of a file, the mean of those in it; with ``vectors:16x1024`` each file has 16, which
are its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features
from zinit.data.vectors import read_vector
from zinit.errors import ConfigError, DataError

SOURCE = re.compile(r"vectors:(?:([1-9]\d{0,4})x)?([1-9]\d{0,5})")


class ReadyVectors(Encoder):
    """Gives files' vectors as they are; the one layer that it has is they.

    Args:
        width: F.
        rows: vectors of each file; None takes any number, and their mean.
        source: that it was named by.
    """

    modality = "vector"
    ready = ("batch", "vectors", "width")
    depth = 1

    def __init__(self, width: int, rows: int | None, *, source: str) -> None:
        super().__init__()
        self.width = self.layer_width = width
        self.rows = rows
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # features go to where it is, in its dtype
        shape = {"type": self.modality, "parameters": 0, "weights": {}, "width": width, "rows": rows}
        self.identity = {"source": source, "modality": self.modality, **shape}

    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Files to (B, rows, F).

        Raises:
            DataError: naming the file, if it cannot be read, or its vectors are of another width or number.
        """
        return torch.from_numpy(np.stack([self._read(item) for item in items]))

    def _read(self, item: Any) -> np.ndarray:
        found = read_vector(item)
        if found.shape[1] != self.width or self.rows not in (None, len(found)):
            expected = f"({self.width},) or (number, {self.width})" if self.rows is None else (self.rows, self.width)
            raise DataError(
                f"{item} holds vectors {found.shape}, and the encoder {self.identity['source']} takes {expected}."
            )
        return found.mean(axis=0, keepdims=True) if self.rows is None else found

    def forward(self, pixels: Tensor, layers: int = 0) -> Features:
        """Tokens are the vectors themselves; their mean is the pooled vector, and that of the layer."""
        pooled = pixels.mean(1)
        return Features(pixels, pooled, (pooled,) * len(self.chosen(layers)))

    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """Who made the vectors is not known: what counts is their shape."""
        for name in ("modality", "width", "rows"):
            if self.identity[name] != identity.get(name):
                return f"{name} is {self.identity[name]}, expected {identity.get(name)}"
        return None


class VectorsLibrary(EncoderLibrary):
    """The library."""

    def knows(self, source: str) -> bool:
        """``vectors:WIDTH`` or ``vectors:NUMBERxWIDTH``."""
        return source.startswith("vectors:")

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """None: there is no module."""
        return None

    def check(self, source: str, *, revision: str | None = None, bgr: bool = False) -> None:
        """See `zinit.adapter.encoding.EncoderLibrary.check`: the source names a width."""
        if SOURCE.fullmatch(source) is None or bgr or revision is not None:
            raise ConfigError(
                f"ready features are named by their width, --encoder vectors:1024, or by number and width, "
                f"vectors:16x1024, without bgr and revision; got {source}."
            )

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`.

        Raises:
            ConfigError: if the source names no width.
        """
        self.check(str(source), revision=revision, bgr=bgr)
        found = SOURCE.fullmatch(str(source))
        assert found is not None
        return ReadyVectors(int(found[2]), None if found[1] is None else int(found[1]), source=str(source))


VECTORS = VectorsLibrary()
