"""Models of transformers for sound: CLAP, AST and Whisper's encoder make tokens, PE-AV a vector of a joint space."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zinit.adapter.encoding import Features
from zinit.encoders.base import TowerEncoder
from zinit.encoders.joint import AUDIO_KINDS, JointTower, joint_features
from zinit.encoders.senses import SenseLibrary, mean_vectors
from zinit.errors import ConfigError, DataError, install_extra
from zinit.files import is_file, parsing

# The kinds of configuration: the class of the tower, and where the encoder is in it.
KINDS = {
    "clap": ("ClapAudioModelWithProjection", ""),
    "clap_audio_model": ("ClapAudioModelWithProjection", ""),
    "audio-spectrogram-transformer": ("ASTModel", ""),
    "whisper": ("WhisperModel", "encoder"),
    **AUDIO_KINDS,
}
LONGEST = 600  # seconds of one sound


class AudioEncoder(TowerEncoder):
    """An audio tower. Its items are sound files; what is longer than the model takes is cut at the end."""

    modality = "audio"
    ready = ()  # each model has a form of its own

    def __init__(self, tower: nn.Module, extractor: Any, *, source: str = "", bgr: bool = False) -> None:
        if bgr:
            raise ConfigError("encoder.bgr is for images; leave it out for sound.")
        known: Any = tower
        if getattr(known.config, "enable_fusion", False):
            raise ConfigError(f"{source or 'this CLAP'} fuses several views of long sounds; take one without fusion.")
        super().__init__(tower, None, source=source, processing="" if extractor is None else extractor.to_json_string())
        self.extractor = extractor
        self.measure(known)

    def measure(self, known: Any) -> None:
        """Sets the widths and the depth."""
        config: Any = known.config
        self.is_clap = hasattr(known, "audio_projection")
        self.layer_width = config.hidden_size if hasattr(config, "hidden_size") else config.d_model
        self.width = self.layer_width
        # CLAP's stages differ in width: it gives the vector of the last alone.
        self.depth = 1 if self.is_clap else int(getattr(config, "num_hidden_layers", 0) or config.encoder_layers)

    @property
    def pooled_width(self) -> int:
        """CLAP's vector has passed a projection, its tokens have not."""
        config: Any = self.tower.config
        return config.projection_dim if self.is_clap else self.width

    def prepare(self, items: Sequence[Any]) -> Tensor:
        """Sound files to what the model takes, by its own extractor.

        Raises:
            ConfigError: if the model came without one.
            DataError: if a file is no sound.
        """
        if self.extractor is None:
            raise ConfigError(
                f"the encoder {self.identity['source'] or type(self.tower).__name__} came without an extractor of "
                f"features (no preprocessor_config.json): give its inputs as a tensor."
            )
        rate = self.extractor.sampling_rate
        most = getattr(self.extractor, "nb_max_samples", None)  # CLAP's own cut is at a random place
        sounds = [read_sound(item, rate)[:most] for item in items]
        made = self.extractor(sounds, sampling_rate=rate, return_tensors="pt")
        return self.batched(made)

    def batched(self, made: Any) -> Tensor:
        """What the extractor has made, as one tensor."""
        return made[getattr(self.tower, "main_input_name", "input_features")]

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """Tokens leave the last norm; CLAP's are those of its last stage. A layer's vector is its tokens' mean."""
        tower: Any = self.tower
        out = tower(pixels, output_hidden_states=bool(layers))
        if not self.is_clap:
            return mean_vectors(out, layers)
        tokens = out.last_hidden_state.flatten(2).transpose(1, 2)
        return Features(tokens, out.audio_embeds, (tokens.mean(1),) if layers else ())


class JointAudioEncoder(AudioEncoder):
    """PE-AV's half for sound. Sounds of one batch may differ in length: a mask goes with them, (B, 2, samples)."""

    def measure(self, known: Any) -> None:
        """One layer, the vector itself."""
        self.is_clap, self.depth = False, 1
        self.width = self.layer_width = known.width

    def batched(self, made: Any) -> Tensor:
        """Sounds and their mask."""
        sounds = made["input_values"]
        return torch.cat([sounds, made["padding_mask"].unsqueeze(1).to(sounds.dtype)], dim=1)

    def features(self, pixels: Tensor, layers: Sequence[int]) -> Features:
        """See `joint_features`.

        Raises:
            ConfigError: if ready sounds come without their mask.
        """
        if pixels.dim() != 3 or pixels.shape[1] != 2:
            raise ConfigError(
                f"ready sounds of this encoder are (batch, 2, samples), samples and 1 where they are sound, 0 where "
                f"they are padding; got {tuple(pixels.shape)}."
            )
        return joint_features(self.tower(pixels[:, :1], pixels[:, 1] > 0), layers)


def audio_encoder(tower: Any, extractor: Any, **how: Any) -> AudioEncoder:
    """The encoder that suits a tower."""
    if hasattr(tower, "audio_head"):
        return JointAudioEncoder(JointTower(tower, "audio"), extractor, **how)
    return AudioEncoder(tower, extractor, **how)


def read_sound(source: Any, rate: int) -> np.ndarray:
    """One channel of float32 at a rate: channels are averaged, other rates resampled.

    Raises:
        DataError: naming the file, if it is missing, no sound, or too long.
        ConfigError: if soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ConfigError(f"sound is read by the package soundfile. {install_extra('audio')}") from error
    if not isinstance(source, str | Path) or not is_file(source):
        raise DataError(f"there is no sound {source}.")
    with parsing(f"{source} is no sound that can be read", DataError):
        known = soundfile.info(str(source))
        if known.duration > LONGEST:
            raise DataError(f"{source} is {known.duration:.0f} seconds long, more than {LONGEST}. Cut it.")
        samples, own = soundfile.read(str(source), dtype="float32", always_2d=True)
    sound = samples.mean(1)
    if not len(sound) or not np.isfinite(sound).all():
        raise DataError(f"{source} holds no sound: it is empty, or not all of its samples are numbers.")
    if own == rate:
        return sound
    from scipy.signal import resample_poly

    common = gcd(own, rate)
    return resample_poly(sound, rate // common, own // common).astype(np.float32)


AUDIO = SenseLibrary("audio", KINDS, audio_encoder, "AutoFeatureExtractor")
