"""Backbones by name. A new one is one file of facts and one line here (or `zinit.register_backbone`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zinit.errors import BackboneError
from zinit.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from zinit.backbones.base import Backbone

BACKBONES = Registry("backbone", {"llama": "zinit.backbones.llama:LLAMA"})


def find_backbone(model: nn.Module) -> Backbone:
    """The registered backbone that knows this model.

    Raises:
        BackboneError: if none does.
    """
    for name in BACKBONES:
        backbone: Backbone = BACKBONES.get(name)
        if backbone.matches(model):
            return backbone
    raise BackboneError(
        f"no backbone knows {type(model).__name__}. Known backbones: {', '.join(BACKBONES)}. "
        f"Describe the model in a short file and register it: zinit.register_backbone('mine', 'my_package:MINE')."
    )
