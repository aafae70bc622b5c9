"""Image models of transformers: whatever ``AutoModel`` loads that gives a sequence of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features
from zinit.encoders.base import ImageEncoder, Prepare
from zinit.errors import BackboneError, ConfigError
from zinit.models.loading import check_complete, model_source, quiet, reason

# Dual encoders, and towers stored apart: the class of the image tower with its projection.
TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
POOLER = "pooler"
CLASS_TOKENS = ("cls_token", "class_embedding")  # what transformers calls the parameter


class TransformersEncoder(ImageEncoder):
    """See `zinit.encoders.base.ImageEncoder`."""

    def __init__(self, tower: nn.Module, prepare: Prepare | None, *, source: str = "", **how: Any) -> None:
        config: Any = tower.config
        if not hasattr(config, "num_hidden_layers") or getattr(tower, "main_input_name", "") != "pixel_values":
            raise ConfigError(
                f"{source or 'the encoder'} is a {type(tower).__name__}, which does not turn images into a sequence of "
                f"tokens. Take the image tower of CLIP, SigLIP, DINOv2 or the like."
            )
        super().__init__(tower, prepare, source=source, **how)
        own = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
        self.has_class_token = not own.isdisjoint(CLASS_TOKENS)
        self.depth, self.layer_width = config.num_hidden_layers, config.hidden_size
        projection: Any = getattr(tower, "visual_projection", None)
        self.width = self.layer_width if projection is None else projection.out_features

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """CLIP norms and projects its class token alone: here all tokens pass both."""
        tower: Any = self.tower
        out = tower(pixel_values=pixels, output_hidden_states=bool(layers))
        tokens = out.last_hidden_state
        if (projection := getattr(tower, "visual_projection", None)) is not None:
            tokens = projection(_post_norm(tower)(tokens))
        pooled = getattr(out, "image_embeds", None)
        pooled = getattr(out, "pooler_output", None) if pooled is None else pooled
        vectors = tuple(self._vector(out.hidden_states[number]) for number in layers)
        return Features(tokens, self._vector(tokens) if pooled is None else pooled, vectors)

    def _vector(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, D): the class token, or the mean where the model has none."""
        if self.has_class_token:
            return tokens[:, 0]
        config: Any = self.tower.config
        return tokens[:, getattr(config, "num_register_tokens", 0) :].mean(1)


def _post_norm(tower: Any) -> nn.Module:
    inner = getattr(tower, "vision_model", tower)
    return inner.post_layernorm


class TransformersEncoders(EncoderLibrary):
    """The library."""

    def knows(self, source: str) -> bool:
        """Whatever no other library claims, see `zinit.adapter.encoding.FALLBACK`."""
        return True

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """An encoder around a tower; None if it is no model of transformers'."""
        from transformers import PreTrainedModel

        return TransformersEncoder(module, None, bgr=bgr) if isinstance(module, PreTrainedModel) else None

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`."""
        import transformers

        source = model_source(source)
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            model_class: Any = getattr(transformers, TOWERS.get(config.model_type, "AutoModel"))
            with quiet():
                tower, report = model_class.from_pretrained(
                    source,
                    config=_vision_config(config),
                    revision=revision,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers raises many classes; all mean that it cannot load this
            raise BackboneError(f"{source} cannot be loaded as an image encoder: {reason(source, error)}") from error
        missing = set(report["missing_keys"])
        if missing and all(name.partition(".")[0] == POOLER for name in missing):  # few checkpoints have one
            setattr(tower, POOLER, None)
        else:
            check_complete(tower, report, source)
        prepare, processing = _processor(source, revision)
        return TransformersEncoder(tower, prepare, processing=processing, source=source, bgr=bgr)


def _vision_config(config: Any) -> Any:
    """Of the image tower; a dual encoder says the width of both projections in one place."""
    own = getattr(config, "vision_config", None)
    if own is None:
        return config
    if hasattr(config, "projection_dim"):
        own.projection_dim = config.projection_dim
    return own


def _processor(source: str, revision: str | None) -> tuple[Prepare | None, str]:
    """By the model's own settings, and these as text; None where it has none."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None, ""

    def prepare(images: Sequence[Image.Image]) -> Tensor:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]

    return prepare, processor.to_json_string()


TRANSFORMERS = TransformersEncoders()
