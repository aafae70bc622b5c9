"""Cache retrieval (ImageBind-LLM, section 3.4): features are pulled towards the nearest ones of a training set.

The bind network is trained on images alone; at inference the features of sounds, points or videos lie a little apart
from those of images. An index holds features of images; a mixture with the nearest of them brings others closer. It is
exact: products with all keys, in blocks. No index library is needed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from zinit.adapter.encoding import Features
from zinit.config import JsonConfig, to_json
from zinit.errors import ConfigError, DataError
from zinit.files import is_file, parsing, read_json, write_atomically
from zinit.validation import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle

KEYS, ABOUT = "keys.npy", "index.json"
BLOCK_BYTES = 64 * 2**20  # of keys in float32, at once


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(JsonConfig):
    """How features are mixed with their neighbours; the defaults are those of ImageBind-LLM's code.

    Args:
        neighbours: k, the keys that are mixed.
        sharpness: factor on their similarities before the softmax.
        weight: of the neighbours' mean, from 0 to 1; the feature itself has the rest.
    """

    called: ClassVar[str] = "retrieval"

    neighbours: PositiveInt = 10
    sharpness: PositiveFloat = 20.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"retrieval.weight must be from 0 to 1; got {self.weight}.")


class FeatureIndex:
    """Keys (N, D) in float16, mapped into memory.

    Args:
        keys: of the index.
        about: what its file says: "normalised", and who made the features.
    """

    def __init__(self, keys: np.ndarray, about: dict[str, Any] | None = None) -> None:
        self.keys, self.about = keys, about or {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """D."""
        return self.keys.shape[1]

    @classmethod
    def open(cls, folder: str | Path) -> FeatureIndex:
        """The index in a folder.

        Raises:
            DataError: if there is none, or it is damaged.
        """
        folder = Path(folder)
        if not is_file(folder / ABOUT) or not is_file(folder / KEYS):
            raise DataError(f"{folder} holds no index ({KEYS}, {ABOUT}). Make one: zinit index build {folder} --data X")
        about = read_json(folder / ABOUT, DataError, "Build the index again.")
        with parsing(f"{folder / KEYS} is damaged", DataError, "Build the index again."):
            keys = np.lib.format.open_memmap(folder / KEYS, mode="c")
        shape = (about.get("keys"), about.get("width")) if isinstance(about, dict) else None
        if keys.dtype != np.float16 or keys.shape != shape:
            raise DataError(f"{folder / KEYS} holds {keys.dtype} {keys.shape}, and {ABOUT} says float16 {shape}.")
        if not isinstance(about.get("encoder"), dict | None):
            raise DataError(f"{folder / ABOUT} names its encoder by {about['encoder']!r}. Build the index again.")
        return cls(keys, about)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        blocks: Iterable[np.ndarray],
        *,
        count: int,
        width: int,
        normalised: bool = True,
        encoder: dict[str, Any] | None = None,
    ) -> FeatureIndex:
        """Writes an index; it is there when its ``index.json`` is.

        Args:
            folder: a new or empty one.
            blocks: the features, (some, D) each, N in all.
            count: N.
            width: D.
            normalised: bring each to the length 1, as the paper's keys are.
            encoder: identity of what made them.

        Raises:
            ConfigError: if the folder is not empty, or cannot be written.
            DataError: if a feature is not finite, too large for float16, or cannot be normalised.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists already. Name a new folder for the index.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
                start, header = 0, {"descr": "<f2", "fortran_order": False, "shape": (count, width)}
                with (Path(made) / KEYS).open("wb") as file:  # not mapped: a full disk is an error that can be caught
                    np.lib.format.write_array_header_1_0(file, header)
                    for block in blocks:
                        file.write(_rounded(block, start, normalised).tobytes())
                        start += len(block)
                if start != count:
                    raise DataError(f"the index was to get {count} features; got {start}.")
                os.replace(Path(made) / KEYS, folder / KEYS)
            about = {"keys": count, "width": width, "normalised": normalised, "encoder": encoder}
            write_atomically(folder / ABOUT, to_json(about, indent=2).encode() + b"\n")
        except OSError as error:
            raise ConfigError(f"the index cannot be written to {folder}: {error.strerror or error}.") from error
        return cls.open(folder)

    @torch.no_grad()
    def search(self, queries: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
        """The nearest keys by inner product: scores (B, k) in float32, the largest first, and their places (B, k).

        Args:
            queries: (B, D).
            neighbours: k; of a smaller index all.

        Raises:
            ConfigError: if the widths differ.
        """
        if queries.dim() != 2 or queries.shape[1] != self.width:
            raise ConfigError(f"the index has keys of width {self.width}; got queries {tuple(queries.shape)}.")
        queries, wanted = queries.float(), min(neighbours, len(self))
        scores = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        rows = max(wanted, BLOCK_BYTES // (4 * self.width))
        for start in range(0, len(self), rows):
            found = queries @ self._block(slice(start, start + rows), queries.device).T
            best, where = found.topk(min(wanted, found.shape[1]))
            scores, places = torch.cat([scores, best], 1), torch.cat([places, where + start], 1)
            scores, kept = scores.topk(min(wanted, scores.shape[1]))
            places = places.gather(1, kept)
        return scores, places

    @torch.no_grad()
    def mix(self, features: Tensor, config: RetrievalConfig | None = None) -> Tensor:
        """Features (B, D) nearer to the index, of length 1:

            a = softmax(sharpness * f K^T) over the k nearest,  p = a K / |a K|,  f' = (1 - weight) f + weight p, / |f'|

        Args:
            features: as the adapter's source would take them, not normalised anew.
            config: the settings; None is the code's.

        Raises:
            ConfigError: if the widths differ.
        """
        config = config or RetrievalConfig()
        scores, places = self.search(features, config.neighbours)
        values = self._block(places.flatten().cpu().numpy(), features.device).view(*places.shape, self.width)
        attention = (config.sharpness * scores).softmax(-1)
        near = normalize((attention[..., None] * values).sum(1), dim=-1)
        mixed = (1 - config.weight) * features.float() + config.weight * near
        return normalize(mixed, dim=-1).to(features.dtype)

    def _block(self, rows: slice | np.ndarray, device: torch.device) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.keys[rows])).to(device).float()


def _rounded(block: np.ndarray, start: int, normalised: bool) -> np.ndarray:
    """A block in float16."""
    block = np.asarray(block, dtype=np.float32)
    lengths = np.linalg.norm(block, axis=1, keepdims=True)
    if normalised and np.any(lengths == 0):
        raise DataError(f"the feature {start + int(np.argmin(lengths))} is zero, and cannot be normalised.")
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = (block / lengths if normalised else block).astype(np.float16)
    if not np.isfinite(rounded).all():
        row = start + int(np.argmin(np.isfinite(rounded).all(axis=1)))
        raise DataError(f"the feature {row} is not finite in float16. Leave it out, or normalise.")
    return rounded


def describe_index(folder: str | Path) -> dict[str, Any]:
    """What ``zinit index info`` prints."""
    index = FeatureIndex.open(folder)
    return {**index.about, "bytes": index.keys.nbytes}


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """An index that pulls what one adapter sees towards its keys.

    Args:
        folder: of the index.
        index: of vectors as the adapter's encoder makes them.
        config: how they are mixed.
    """

    folder: str
    index: FeatureIndex
    config: RetrievalConfig

    @classmethod
    def open(cls, folder: str | Path, config: RetrievalConfig) -> Retrieval:
        """The index in a folder.

        Args:
            folder: of the index.
            config: how features are mixed.

        Raises:
            DataError: if there is no index.
        """
        return cls(folder=str(folder), index=FeatureIndex.open(folder), config=config)

    def check(self, handle: Handle | None) -> None:
        """The index is one for an adapter.

        Args:
            handle: of the adapter; None where a method has none.

        Raises:
            ConfigError: if the adapter sees nothing, takes more than one vector of a sample, or its encoder is not the
                index's.
        """
        folder, index = self.folder, self.index
        source = None if handle is None else handle.shared.get("context")
        if handle is None or source is None:
            raise ConfigError(
                f"the index {folder} mixes what an adapter sees, and this one sees nothing. Leave the index out, or "
                f"train one that sees (--method imagebind-llm)."
            )
        takes = getattr(source, "takes", ())
        if takes != ("pooled",):
            raise ConfigError(
                f"an index mixes one vector of each sample, and the adapter's source takes {', '.join(takes)}. Leave "
                f"the index out, or train with a source that takes one: bind (--method imagebind-llm)."
            )
        encoder, made_by = handle.get_encoder(), index.about.get("encoder")
        if encoder.pooled_width != index.width:
            raise ConfigError(
                f"the index {folder} has keys of width {index.width}, and the adapter's encoder gives vectors of width "
                f"{encoder.pooled_width}. Build one of its vectors: zinit index build."
            )
        if made_by and (text := encoder.difference(made_by)):
            raise ConfigError(
                f"the index {folder} was built by another encoder than the adapter's: {text}. Build one with it "
                f"(--encoder {encoder.identity.get('source') or 'ID'}); of encoders that share a space, from a file of "
                f"features (--data vectors.npy)."
            )

    def __call__(self, features: Features) -> Features:
        """Features whose pooled vectors are mixed with their nearest keys; each is made a unit vector before."""
        assert features.pooled is not None
        return replace(features, pooled=self.index.mix(normalize(features.pooled.float(), dim=-1), self.config))
