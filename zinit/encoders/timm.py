"""Image models of timm that give a sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features
from zinit.encoders.base import ImageEncoder, Prepare, described
from zinit.errors import ConfigError
from zinit.models.timm import load_timm


class TimmEncoder(ImageEncoder):
    """See `zinit.encoders.base.ImageEncoder`."""

    def __init__(self, tower: nn.Module, prepare: Prepare, *, source: str = "", **how: Any) -> None:
        known: Any = tower
        if not hasattr(known, "forward_intermediates") or not hasattr(known, "blocks"):
            raise ConfigError(
                f"{source or type(tower).__name__} gives no sequence of image tokens; take a ViT of timm."
            )
        super().__init__(tower, prepare, source=source, **how)
        self.depth, self.width, self.layer_width = len(known.blocks), known.num_features, known.embed_dim

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """Tokens leave the last norm; a layer's vector is its class token, or the mean of its tokens."""
        tower: Any = self.tower
        has_class = getattr(tower, "cls_token", None) is not None
        numbers = [number - 1 for number in layers]
        tokens, found = tower.forward_intermediates(
            pixels, indices=numbers or 1, return_prefix_tokens=True, output_fmt="NLC"
        )
        pooled = tower.forward_head(tokens, pre_logits=True)
        vectors = tuple(prefix[:, 0] if has_class else words.mean(1) for words, prefix in found)
        return Features(tokens, pooled, vectors if layers else ())


class TimmEncoders(EncoderLibrary):
    """The library."""

    def knows(self, source: str) -> bool:
        """A folder in timm's format, a Hub id of timm's, or a name of one of its models."""
        import timm

        if (Path(source) / "config.json").is_file():
            return "architecture" in described(source)
        return source.startswith(("timm/", "hf-hub:")) or (
            "/" not in source and timm.is_model(source.partition(":")[0])
        )

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """An encoder around a tower; None if it is no model of timm's."""
        return _encoder(module, bgr=bgr) if hasattr(module, "pretrained_cfg") else None

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`."""
        tower, _ = load_timm(source, dtype=torch.float32, revision=revision)
        return _encoder(tower, source=str(source), bgr=bgr)


def _encoder(tower: nn.Module, **how: Any) -> TimmEncoder:
    """With the model's own way from images to pixels."""
    from timm.data import create_transform, resolve_data_config

    settings = resolve_data_config({}, model=tower)
    if (size := getattr(getattr(tower, "patch_embed", None), "img_size", None)) is not None:
        settings["input_size"] = (settings["input_size"][0], *size)  # as made, where its configuration says another
    transform: Any = create_transform(**settings)

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([transform(image) for image in images])

    return TimmEncoder(tower, prepare, processing=repr(settings), **how)


TIMM = TimmEncoders()
