"""Encoders: what turns images into features, which a context source turns into prompts.

An encoder is frozen and never part of an adapter's file; who it was is recorded there. `zinit.encoders` has those over
transformers and timm; they are found here by name and imported when first needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.registries import ENCODERS
from zinit.errors import CheckpointError, ConfigError

FALLBACK = "transformers"  # the library that is asked last: a Hub id does not say what it is


@dataclass(frozen=True, eq=False)
class Features:
    """What an encoder makes of B images, or of the images of B samples; None is what nobody asked for.

    Attributes:
        tokens: (B, N, D), after the tower's last norm, and its projection if it has one.
        pooled: (B, D).
        layers: (B, W) each: one vector for each of the chosen layers, the lowest first.
        mask: (B, N) boolean, which tokens there are; None is all.
        present: (B,) boolean, which samples have an image; None is all.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    present: Tensor | None = None

    def to(self, device: torch.device) -> Features:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Each tensor changed."""

        def one(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Features(
            tokens=one(self.tokens),
            pooled=one(self.pooled),
            layers=tuple(map(change, self.layers)),
            mask=one(self.mask),
            present=one(self.present),
        )


class Encoder(nn.Module, ABC):
    """A frozen tower, always in evaluation mode.

    Attributes:
        modality: what it takes: "image", "audio", "video" or "vector", ready features.
        ready: the axes of its inputs; empty where models differ in them.
        width: D of its tokens.
        layer_width: of a layer's vector.
        depth: number of its layers.
        identity: what tells it from another; plain values, ``source`` among them.
        processing: tells one way from images to pixels from another; features of one are not those of the other.
    """

    modality = "image"
    ready: tuple[str, ...] = ("batch", "3", "height", "width")
    processing = ""
    width: int
    layer_width: int
    depth: int
    identity: dict[str, Any]

    @abstractmethod
    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Images to (B, 3, H, W), by the model's own processor."""

    @abstractmethod
    def forward(self, pixels: Tensor, layers: int = 0) -> Features:
        """Features of (B, 3, H, W); with ``layers`` a vector of that many layers, equally spaced, the last included."""

    @abstractmethod
    def difference(self, identity: Mapping[str, Any]) -> str | None:
        """How it differs from the encoder of a recorded identity, in words; None if it does not."""

    @property
    def pooled_width(self) -> int:
        """Of the pooled vector."""
        return self.width

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def chosen(self, layers: int) -> list[int]:
        """The numbers of so many layers, from 1: equally spaced, the last included.

        Raises:
            ConfigError: if there are fewer.
        """
        if not 0 <= layers <= self.depth:
            raise ConfigError(
                f"the encoder has {self.depth} layers, and {layers} are asked for: context.layers is at most "
                f"{self.depth} with it."
            )
        return [round(self.depth * (index + 1) / layers) for index in range(layers)]


class EncoderLibrary(ABC):
    """Loads encoders from one library."""

    @abstractmethod
    def knows(self, source: str) -> bool:
        """Whether a folder, name or Hub id is one of its models."""

    @abstractmethod
    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """An encoder around a model of the library; None if it is none.

        Raises:
            ConfigError: if it gives no sequence of tokens.
        """

    def check(self, source: str, *, revision: str | None = None, bgr: bool = False) -> None:  # noqa: B027 - most have nothing
        """What can be said of a source before anything is loaded.

        Raises:
            ConfigError: if it cannot be one.
        """

    @abstractmethod
    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """An encoder.

        Args:
            source: folder, name or Hub id.
            revision: on the Hub.
            bgr: images are given to it with their channels in reverse, as OpenCV reads them.

        Raises:
            BackboneError: if there is no such model.
        """


def load_feature_encoder(
    source: str | Path | Encoder | nn.Module,
    *,
    beside: nn.Module | None = None,
    revision: str | None = None,
    bgr: bool = False,
) -> Encoder:
    """An encoder from a folder, name or Hub id, or around a module of transformers' or timm's.

    Args:
        source: what it is made of. A module stays where it is.
        beside: the model whose device a loaded one goes to.
        revision: on the Hub.
        bgr: see `EncoderLibrary.load`.

    Raises:
        BackboneError: if there is no such model.
        ConfigError: if a module is of no known library.
    """
    if isinstance(source, Encoder):
        return source
    if isinstance(source, nn.Module):
        for library in _libraries():
            if (encoder := library.wrap(source, bgr=bgr)) is not None:
                return encoder
        raise ConfigError(f"{type(source).__name__} is no image model of transformers or timm; pass an `Encoder`.")
    encoder = library_of(str(source)).load(source, revision=revision, bgr=bgr)
    device = None if beside is None else next(beside.parameters()).device
    return encoder if device is None or device.type == "meta" else encoder.to(device)


def library_of(source: str) -> EncoderLibrary:
    """The library that loads the encoder of a folder, name or Hub id."""
    return next(library for library in _libraries() if library.knows(source))


def _libraries() -> list[EncoderLibrary]:
    return [ENCODERS.get(name) for name in sorted(ENCODERS, key=FALLBACK.__eq__)]


def same_encoder(
    source: str | Path | Encoder | nn.Module, identity: Mapping[str, Any], *, beside: nn.Module
) -> Encoder:
    """The encoder that an adapter was trained with, from wherever it is now.

    Raises:
        CheckpointError: if it is another one; the message names what differs.
    """
    encoder = load_feature_encoder(source, beside=beside, bgr=bool(identity.get("bgr", False)))
    if identity and (text := encoder.difference(identity)):
        raise CheckpointError(
            f"this adapter was trained with another encoder than {encoder.identity.get('source') or source}: {text}. "
            f"It was {identity.get('source') or 'a module'}."
        )
    return encoder


@torch.no_grad()
def encode(encoder: Encoder, items: Sequence[Any] | Tensor, *, layers: int = 0) -> Features:
    """The features of each sample's images.

    Args:
        encoder: runs once for all images.
        items: for each sample an image (or what else the encoder takes), a list of several, or None; or ready pixels
            (B, 3, H, W).
        layers: how many layers' vectors are wanted.

    Raises:
        ConfigError: if no sample has an image.
    """
    where = next(encoder.parameters())
    if isinstance(items, Tensor):
        if encoder.ready and items.dim() != len(encoder.ready):
            raise ConfigError(f"pixels must be ({', '.join(encoder.ready)}); got {tuple(items.shape)}.")
        return encoder(items.to(where.device, where.dtype), layers)
    groups = [[] if item is None else list(item) if isinstance(item, list | tuple) else [item] for item in items]
    images = [image for group in groups for image in group]
    if not images:
        raise ConfigError(f"none of the {len(groups)} samples has an image: call the model without one.")
    made = encoder(encoder.prepare(images).to(where.device, where.dtype), layers)
    return by_sample(made, [len(group) for group in groups])


def by_sample(made: Features, counts: Sequence[int]) -> Features:
    """A sample's tokens are those of its images, one after the other; its vectors are their mean.

    Args:
        made: features of all images, sample by sample.
        counts: how many images each sample has.
    """
    if set(counts) == {1}:
        return made
    tokens, mask = (None, None) if made.tokens is None else _in_rows(made.tokens, counts)
    return Features(
        tokens=tokens,
        pooled=None if made.pooled is None else _means(made.pooled, counts),
        layers=tuple(_means(vectors, counts) for vectors in made.layers),
        mask=mask,
        present=torch.tensor([count > 0 for count in counts], device=_device(made)),
    )


def _device(made: Features) -> torch.device:
    return next(x.device for x in (made.tokens, made.pooled, *made.layers) if x is not None)


def _in_rows(made: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(images, N, D) to (samples, most images x N, D), and which of these tokens there are."""
    _, length, width = made.shape
    longest = max(1, *counts) * length
    tokens = made.new_zeros(len(counts), longest, width)
    mask = torch.zeros(len(counts), longest, dtype=torch.bool, device=made.device)
    for row, own in enumerate(made.split(list(counts))):
        tokens[row, : len(own) * length] = own.flatten(0, 1)
        mask[row, : len(own) * length] = True
    return tokens, mask


def _means(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """(images, D) to (samples, D); zeros for a sample without an image."""
    zero = vectors.new_zeros(vectors.shape[1:])
    return torch.stack([own.mean(0) if len(own) else zero for own in vectors.split(list(counts))])
