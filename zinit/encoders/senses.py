"""What encoders of sound and video share: how a tower of transformers is found and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.adapter.encoding import Encoder, EncoderLibrary, Features
from zinit.encoders.base import described
from zinit.errors import BackboneError
from zinit.models.loading import model_source, quiet, reason

Kinds = Mapping[str, tuple[str, str]]


def named(source: str | Path, library: str) -> str:
    """A source without the library's name before it."""
    return str(source).removeprefix(f"{library}:")


def config_kind(source: str) -> str:
    """The model type that a folder's ``config.json`` names; empty for anything else."""
    return str(described(source).get("model_type", ""))


def load_tower(source: str, kinds: Kinds, sense: str, revision: str | None) -> nn.Module:
    """The encoder of a model, its weights complete.

    Args:
        source: folder or Hub id.
        kinds: {model type: (class of transformers, attribute that is the encoder; empty for the whole)}.
        sense: for messages.
        revision: on the Hub.

    Raises:
        BackboneError: if there is no such model, it is of no known kind, or weights of the encoder are missing.
    """
    import transformers

    source = model_source(source)
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many classes; all mean that it cannot load this
        raise BackboneError(f"{source} cannot be loaded as an encoder of {sense}: {reason(source, error)}") from error
    if config.model_type not in kinds:
        raise BackboneError(f"{source} is a {config.model_type}; {sense} encoders are {', '.join(kinds)}.")
    name, part = kinds[config.model_type]
    model_class: Any = getattr(transformers, name)
    if not isinstance(config, model_class.config_class):  # a model of two towers
        config = config.audio_config if sense == "audio" else config.video_config
    try:
        with quiet(), redirect_stdout(StringIO()):  # transformers' PE-AV prints what its own docstrings lack
            model, report = model_class.from_pretrained(
                source, config=config, revision=revision, trust_remote_code=False, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        raise BackboneError(f"{source} cannot be loaded as an encoder of {sense}: {reason(source, error)}") from error
    missing = [key for key in report["missing_keys"] if not part or key.startswith(f"{part}.")]
    if missing:
        raise BackboneError(f"{source} lacks weights of its {sense} encoder: {', '.join(sorted(missing)[:5])}.")
    return getattr(model, part) if part else model


class SenseLibrary(EncoderLibrary):
    """Towers of transformers for one sense.

    Args:
        sense: "audio" or "video"; ``SENSE:HUB_ID`` names a tower.
        kinds: see `load_tower`.
        encoder: around a tower and what prepares its input, or None.
        processor: the class of transformers that loads what prepares the input.
    """

    def __init__(self, sense: str, kinds: Kinds, encoder: Callable[..., Encoder], processor: str) -> None:
        self.sense, self.kinds, self.encoder, self.processor = sense, kinds, encoder, processor

    def knows(self, source: str) -> bool:
        """A folder of one of the kinds, or ``SENSE:HUB_ID``."""
        return source.startswith(f"{self.sense}:") or config_kind(source) in self.kinds

    def wrap(self, module: nn.Module, *, bgr: bool) -> Encoder | None:
        """An encoder around a tower; None if it is of no known kind."""
        kind = getattr(getattr(module, "config", None), "model_type", "")
        if kind not in self.kinds:
            return None
        part = self.kinds[kind][1]
        return self.encoder(getattr(module, part, module) if part else module, None, bgr=bgr)

    def load(self, source: str | Path, *, revision: str | None = None, bgr: bool = False) -> Encoder:
        """See `zinit.adapter.encoding.EncoderLibrary.load`."""
        import transformers

        name = named(source, self.sense)
        tower = load_tower(name, self.kinds, self.sense, revision)
        try:
            processor = getattr(transformers, self.processor).from_pretrained(name, revision=revision)
        except (OSError, ValueError):
            processor = None
        return self.encoder(tower, processor, source=str(source), bgr=bgr)


def mean_vectors(out: Any, layers: Sequence[int]) -> Features:
    """What a tower gives, as it is; where it pools nothing, and for each layer, the mean of the tokens."""
    tokens = out.last_hidden_state
    pooled = getattr(out, "pooler_output", None)
    vectors = tuple(out.hidden_states[number].mean(1) for number in layers)
    return Features(tokens, tokens.mean(1) if pooled is None else pooled, vectors)
