"""Loading pretrained models, with errors a user can act on. Remote code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zinit.errors import BackboneError


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
