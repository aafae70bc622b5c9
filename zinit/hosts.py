"""Loading pretrained models, with errors a user can act on. Remote code is never run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.errors import BackboneError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_causal_lm(
    source: str | Path, *, dtype: torch.dtype, revision: str | None = None, tokenizer: bool = True
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, on the CPU.

    Args:
        source: a folder in transformers' format, or a Hub id.
        dtype: of the weights.
        revision: on the Hub.
        tokenizer: False loads none (None comes back).

    Raises:
        BackboneError: if there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(source)
    try:
        loaded = None
        if tokenizer:
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; all mean that this is no model it can load
        raise BackboneError(f"{source} cannot be loaded as a causal language model: {first_line(error)}") from error
    return model, loaded


@dataclass(frozen=True)
class ClipProcessor:
    """What turns texts and pictures into a dual encoder's inputs.

    Args:
        tokenizer: of the text tower.
        mean: of the pixels' channels, in 0..1.
        std: see ``mean``.
    """

    tokenizer: Any
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def load_clip(
    source: str | Path, *, dtype: torch.dtype, revision: str | None = None
) -> tuple[nn.Module, ClipProcessor]:
    """CLIP or another dual encoder of its kind, and its tokenizer and pixel statistics (CLIP's, if it names none).

    Args:
        source: a folder in transformers' format, or a Hub id.
        dtype: of the weights.
        revision: on the Hub.

    Raises:
        BackboneError: if there is no such model, or it does not compare pictures with texts.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    source = model_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModel.from_pretrained(source, dtype=dtype, revision=revision, trust_remote_code=False)
    except Exception as error:  # as in load_causal_lm
        raise BackboneError(f"{source} cannot be loaded as a dual encoder such as CLIP: {first_line(error)}") from error
    needed = ("get_image_features", "get_text_features", "logit_scale")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise BackboneError(
            f"{source} is a {type(model).__name__}, which has no {', '.join(missing)}. "
            f"Expected a model of pictures and texts such as openai/clip-vit-base-patch16."
        )
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
    except OSError:
        settings = {}
    mean, std = settings.get("image_mean") or CLIP_MEAN, settings.get("image_std") or CLIP_STD
    return model, ClipProcessor(tokenizer, tuple(mean), tuple(std))


def load_on_meta(source: str | Path) -> nn.Module:
    """A model's modules without its weights, from its config alone.

    Args:
        source: a folder in transformers' format, or a Hub id.

    Raises:
        BackboneError: if there is no such model.
    """
    import transformers

    source = model_source(source)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        name = (config.architectures or [""])[0]
        model_class: Any = getattr(transformers, name, None)
        known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
        with torch.device("meta"):
            return model_class(config) if known else transformers.AutoModel.from_config(config)
    except Exception as error:
        raise BackboneError(f"{source} cannot be inspected: {first_line(error)}") from error


def model_source(source: str | Path) -> str:
    """A path or Hub id that may be a model.

    Raises:
        BackboneError: if it is a path that holds no model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(f"the folder {source} holds no model: it has no config.json.")
        return str(path)
    text = str(source)
    if path.is_file() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BackboneError(f"there is no model folder {source}. Expected a folder with a config.json, or a Hub id.")
    return text


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
