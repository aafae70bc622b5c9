"""Models of transformers that take video: VideoMAE and V-JEPA 2 make tokens, PE-AV a vector of a joint space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zinit.adapter.encoding import Features
from zinit.encoders.base import TowerEncoder
from zinit.encoders.frames import read_frames
from zinit.encoders.joint import VIDEO_KINDS, JointTower, joint_features
from zinit.encoders.senses import SenseLibrary, mean_vectors
from zinit.errors import ConfigError, DataError

KINDS = {
    "videomae": ("VideoMAEModel", ""),
    "vjepa2": ("VJEPA2Model", ""),
    **VIDEO_KINDS,
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
        self.measure(config)

    def measure(self, config: Any) -> None:
        """Sets the widths and the depth."""
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
        return mean_vectors(tower(pixels, output_hidden_states=bool(layers), **how), layers)


class JointVideoEncoder(VideoEncoder):
    """PE-AV's half for video."""

    def measure(self, config: Any) -> None:
        """One layer, the vector itself."""
        self.depth = 1
        self.width = self.layer_width = int(config.text_config.hidden_size)

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """See `joint_features`."""
        return joint_features(self.tower(pixels), layers)


def video_encoder(tower: Any, processor: Any, **how: Any) -> VideoEncoder:
    """The encoder that suits a tower."""
    if hasattr(tower, "video_head"):
        return JointVideoEncoder(JointTower(tower, "video"), processor, **how)
    return VideoEncoder(tower, processor, **how)


VIDEO = SenseLibrary("video", KINDS, video_encoder, "AutoVideoProcessor")
