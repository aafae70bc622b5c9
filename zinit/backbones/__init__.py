"""Backbones by name. A new one is one file of facts and one line here.

Outside of zinit: `zinit.register_backbone`, or an entry point of the group ``zinit.backbones`` (docs/new-backbone.md).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from zinit.errors import BackboneError, ConfigError
from zinit.registry import Entry, Registry

if TYPE_CHECKING:
    from torch import nn

    from zinit.backbones.base import Backbone

DISCOVERY = "transformers"
BACKBONES = Registry(
    "backbone",
    {
        "clip": Entry(
            "zinit.backbones.clip:CLIP",
            "CLIP: a text tower and a vision tower, each with its own layers; towers=[...] chooses.",
            facts={"default_task": "base-to-novel"},
        ),
        "llama": Entry(
            "zinit.backbones.llama:LLAMA",
            "LLaMA and decoders laid out like it (Mistral, Qwen2): rotated keys without a norm.",
            facts={"default_task": "alpaca"},
        ),
        "roberta": Entry(
            "zinit.backbones.roberta:ROBERTA",
            "RoBERTa and encoders laid out like it (BERT, CamemBERT, ELECTRA, XLM-RoBERTa).",
            facts={"default_task": "squad"},
        ),
        "vit": Entry(
            "zinit.backbones.vit:VIT",
            "timm's Vision Transformers, EVA, BEiT, Swin and others that attend as they do.",
            facts={"default_task": "vtab"},
        ),
        DISCOVERY: Entry(
            "zinit.backbones._discover:TRANSFORMERS",
            "Any other model of transformers whose keys and values zinit can verify numerically.",
            facts={"default_task": "alpaca"},
        ),
    },
    group="zinit.backbones",
)


def find_backbone(model: nn.Module) -> Backbone:
    """The backbone that knows this model: registered ones are asked first, then zinit's own, then discovery.

    A registered one that cannot be imported is passed over with a warning: it may have nothing to do with this model.

    Raises:
        BackboneError: if none does.
    """
    for name in sorted(BACKBONES, key=lambda name: (name in BACKBONES.shipped, name == DISCOVERY)):
        try:
            backbone: Backbone = BACKBONES.get(name)
        except ConfigError as error:
            warnings.warn(str(error), stacklevel=3)
            continue
        if backbone.matches(model):
            return backbone
    raise BackboneError(
        f"no backbone knows {type(model).__name__}. Known backbones: {', '.join(BACKBONES)}. "
        f"Describe the model in a short file and register it: zinit.register_backbone('mine', 'my_package:MINE')."
    )
