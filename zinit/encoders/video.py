"""Models of transformers that turn video into a sequence of tokens: VideoMAE, V-JEPA 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features
from zinit.encoders.base import TowerEncoder
from zinit.encoders.frames import read_frames
from zinit.encoders.senses import config_kind, load_tower, named
from zinit.errors import ConfigError, DataError

KINDS = {
    "videomae": ("VideoMAEModel", ""),
    "vjepa2": ("VJEPA2Model", ""),
}
FRAMES = 16  # where the model's configuration says nothing


class VideoEncoder(TowerEncoder):
    """A video tower. Its items are folders of frames, lists of images, or video files; frames are equally spaced."""

    modality = "video"
    ready = ("batch", "frames", "3", "height", "width")

    def __init__(self, tower: nn.Module, processor: Any, *, source: str = "", bgr: bool = False) -> None:
        if bgr:
            raise ConfigError("encoder.bgr is for images; leave it out for video.")
        text = "" if processor is None else processor.to_json_string()
        super().__init__(tower, None, source=source, processing=text)
        config: Any = tower.config
        self.processor_of_video = processor
        self.frames = int(getattr(config, "num_frames", 0) or getattr(config, "frames_per_clip", 0) or FRAMES)
        self.depth, self.layer_width = config.num_hidden_layers, config.hidden_size
        self.width = self.layer_width

    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Videos to (B, T, 3, H, W), by the model's own processor.

        Raises:
            ConfigError: if the model came without one.
            DataError: if an item is no video.
        """
        if self.processor_of_video is None:
            raise ConfigError(
                f"the encoder {self.identity['source'] or type(self.tower).__name__} came without a video processor: "
                f"give pixels (batch, frames, 3, height, width)."
            )
        videos = [read_frames(item, self.frames) for item in items]
        for item, frames in zip(items, videos, strict=True):
            if len(sizes := {frame.size for frame in frames}) > 1:
                raise DataError(f"{item}: frames of a video are of one size; got {sorted(sizes)[:3]}. Scale them.")
        made = self.processor_of_video(videos, return_tensors="pt")
        return made["pixel_values_videos"] if "pixel_values_videos" in made else made["pixel_values"]

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """Tokens as the model gives them; a layer's vector is the mean of its tokens."""
        tower: Any = self.tower
        how = {"skip_predictor": True} if tower.config.model_type == "vjepa2" else {}
        out = tower(pixels, output_hidden_states=bool(layers), **how)
        tokens = out.last_hidden_state
        pooled = getattr(out, "pooler_output", None)
        vectors = tuple(out.hidden_states[number].mean(1) for number in layers)
        return Features(tokens, tokens.mean(1) if pooled is None else pooled, vectors)


class VideoEncoders(EncoderLibrary):
    """The library."""

    def knows(self, source: str) -> bool:
        """A folder of one of `KINDS`, or ``video:HUB_ID``."""
        return source.startswith("video:") or config_kind(source) in KINDS

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """An encoder around a tower; None if it is none of `KINDS`."""
        kind = getattr(getattr(module, "config", None), "model_type", "")
        if kind not in KINDS:
            return None
        part = KINDS[kind][1]
        return VideoEncoder(getattr(module, part, module) if part else module, None, bgr=bgr)

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`."""
        from transformers import AutoVideoProcessor

        tower = load_tower(named(source, "video"), KINDS, "video", revision)
        try:
            processor = AutoVideoProcessor.from_pretrained(named(source, "video"), revision=revision)
        except (OSError, ValueError):
            processor = None
        return VideoEncoder(tower, processor, source=str(source), bgr=bgr)


VIDEO = VideoEncoders()
