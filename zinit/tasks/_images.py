"""The images of a task's examples: which there are, and their features in a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from zinit.adapter.encoding import Features
from zinit.data.images import ImageSource, content_digest, read_image, thumbnail
from zinit.errors import ConfigError, DataError
from zinit.tasks.base import Batch, TaskInputs

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle
    from zinit.encoders.cache import FeatureCache

PREFIX = "image_"  # of the names that features have in a batch


class WithImages(Protocol):
    """An example: its images, and what tells each from another."""

    @property
    def images(self) -> Sequence[ImageSource]: ...

    @property
    def digests(self) -> tuple[bytes, ...]: ...


class Digests:
    """Content digests of images; a file that many examples share is read once."""

    def __init__(self) -> None:
        self._known: dict[Path | int, bytes] = {}

    def __call__(self, images: Sequence[ImageSource]) -> tuple[bytes, ...]:
        """One for each image.

        Raises:
            DataError: if there is no such file.
        """
        return tuple(self._one(image) for image in images)

    def _one(self, image: ImageSource) -> bytes:
        key = image if isinstance(image, Path) else id(image)  # the caller keeps the image
        if key not in self._known:
            self._known[key] = content_digest(image)
        return self._known[key]


class TaskImages:
    """Gives the adapter the images of the examples at hand.

    Args:
        handle: of the adapter.
        features: of the images; a run fills it before anything is computed.
        examples: all of the task's.
        seed: of which image stands for which in `shuffled`.
    """

    def __init__(self, handle: Handle, features: FeatureCache, examples: Sequence[WithImages], *, seed: int) -> None:
        self.handle, self.features = handle, features
        self.sources = {
            digest: image for example in examples for digest, image in zip(example.digests, example.images, strict=True)
        }
        self._groups, self._seed = {example.digests for example in examples if example.digests}, seed
        self._instead: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}

    @classmethod
    def of(cls, inputs: TaskInputs, *parts: Sequence[WithImages], packing: bool = False) -> TaskImages | None:
        """Of a task's examples; None where none has an image.

        Raises:
            ConfigError: if the adapter takes no images, or examples are packed.
        """
        examples = [example for part in parts for example in part]
        if not any(example.images for example in examples):
            return None
        if inputs.handle is None or inputs.features is None:
            raise ConfigError(
                f"{sum(bool(example.images) for example in examples)} examples have images, and the method takes none. "
                f"Take one that does (--method v1-multimodal), or leave the images out: -o task.images=false."
            )
        if packing:
            raise ConfigError("examples with images cannot be packed: leave packing off, -o task.packing=false.")
        return cls(inputs.handle, inputs.features, examples, seed=inputs.seed)

    def batch(self, examples: Sequence[WithImages]) -> Batch:
        """The examples' features (`zinit.adapter.encoding.Features`) as entries of a batch, on the CPU."""
        found = self.features.features([self._instead.get(example.digests, example.digests) for example in examples])
        present = torch.ones(len(examples), dtype=torch.bool) if found.present is None else found.present
        tensors = {"tokens": found.tokens, "pooled": found.pooled, "mask": found.mask, "present": present}
        tensors |= {"layers": torch.stack(found.layers, dim=1)} if found.layers else {}
        return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if tensor is not None}

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """The adapter has the images of a batch while inside."""
        own = {name.removeprefix(PREFIX): tensor for name, tensor in batch.items() if name.startswith(PREFIX)}
        layers = own.pop("layers").unbind(1) if "layers" in own else ()
        features = Features(layers=layers, **own)
        if self.features.retrieval is not None:
            features = self.features.retrieval(features)
        with self.handle.given(features=features) if self.handle.active else nullcontext():
            yield

    @contextmanager
    def shuffled(self) -> Iterator[None]:
        """Every example has the images of another one while inside, drawn by the seed."""
        distinct = sorted(self._groups)
        random.Random(self._seed).shuffle(distinct)
        self._instead = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        try:
            yield
        finally:
            self._instead = {}

    def thumbnail(self, example: WithImages) -> dict[str, str]:
        """A sample's entry "image" for a report: a small copy of its first image."""
        if not example.digests:
            return {}
        chosen = self._instead.get(example.digests, example.digests)[0]
        try:
            pixels = np.asarray(read_image(self.sources[chosen]))
        except DataError:  # it has been taken away since it was encoded
            return {}
        return {"image": thumbnail(torch.from_numpy(pixels.transpose(2, 0, 1).copy()))}
