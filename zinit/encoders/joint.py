"""PE-AV of transformers: sounds and videos in one space with text. What has passed that space's projection counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zinit.adapter.encoding import Features

# The kinds of configuration: the class of the model, and where the model of one sense is in it.
AUDIO_KINDS = {"pe_audio": ("PeAudioModel", ""), "pe_audio_video": ("PeAudioVideoModel", "audio_model")}
VIDEO_KINDS = {"pe_video": ("PeVideoModel", ""), "pe_audio_video": ("PeAudioVideoModel", "video_model")}


class JointTower(nn.Module):
    """The encoder of one sense and its way into the joint space, without the model of text beside it.

    Args:
        model: `PeAudioModel` or `PeVideoModel`.
        sense: "audio" or "video".
    """

    def __init__(self, model: Any, sense: str) -> None:
        super().__init__()
        self.encoder, self.head = getattr(model, f"{sense}_encoder"), getattr(model, f"{sense}_head")
        self.config = model.config
        self.width = int(model.config.text_config.hidden_size)

    def forward(self, ready: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, D): of sounds (B, 1, samples), of which a mask (B, samples) tells those that are padding; of videos."""
        how = {} if padding_mask is None else {"padding_mask": padding_mask}
        return self.head(self.encoder(ready, **how).pooler_output)


def joint_features(vector: Tensor, layers: Sequence[int]) -> Features:
    """Of a vector (B, D) in the joint space: it is the one token, the pooled vector and that of the one layer."""
    return Features(vector.unsqueeze(1), vector, (vector,) * len(layers))
