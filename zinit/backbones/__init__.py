"""Backbones by name. A new one is one file of facts and one line here (or `zinit.register_backbone`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zinit.errors import BackboneError
from zinit.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from zinit.backbones.base import Backbone

DISCOVERY = "transformers"
BACKBONES = Registry(
    "backbone",
    {
        "clip": "zinit.backbones.clip:CLIP",
        "llama": "zinit.backbones.llama:LLAMA",
        "roberta": "zinit.backbones.roberta:ROBERTA",
        "vit": "zinit.backbones.vit:VIT",
        DISCOVERY: "zinit.backbones._discover:TRANSFORMERS",
    },
)


def find_backbone(model: nn.Module) -> Backbone:
    """The registered backbone that knows this model; discovery is asked last.

    Raises:
        BackboneError: if none does.
    """
    for name in sorted(BACKBONES, key=lambda name: name == DISCOVERY):
        backbone: Backbone = BACKBONES.get(name)
        if backbone.matches(model):
            return backbone
    raise BackboneError(
        f"no backbone knows {type(model).__name__}. Known backbones: {', '.join(BACKBONES)}. "
        f"Describe the model in a short file and register it: zinit.register_backbone('mine', 'my_package:MINE')."
    )
