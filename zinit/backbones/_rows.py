"""What the batch of an attention module of transformers holds: samples, their beams, or other things."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from zinit.backbones.base import Rows

PLACEHOLDER = re.compile(r"^(images?|video|vision|audio|speech|media)_(.*_)?token_(id|index)$")


def rows_of(model: nn.Module, name: str, module: nn.Module) -> Rows:
    """What stands side by side in the batch of one attention module.

    Beams: text, read from left to right. Other things: what a text has placeholders for, in whatever number; a model
    says so by a token of its config that stands for them.

    Args:
        model: the host.
        name: the module's path in it.
        module: the attention module.
    """
    parts = name.split(".")
    above: list[Any] = [model, *(model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))]
    models = [part for part in above if hasattr(part, "input_modalities")]  # outermost first
    if models and "text" not in _modalities(models[-1]):
        outer = [part for part in models if "text" in _modalities(part)]
        return "other" if any(map(_has_placeholder, outer)) else "samples"
    return "beams" if getattr(module, "is_causal", True) else "samples"


def _modalities(model: Any) -> tuple[str, ...]:
    taken = model.input_modalities
    return (taken,) if isinstance(taken, str) else tuple(taken)


def _has_placeholder(model: Any) -> bool:
    return any(PLACEHOLDER.match(name) for name in vars(model.config))
