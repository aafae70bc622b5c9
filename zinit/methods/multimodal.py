"""The family's methods with images: V1's, V2's as its paper describes it and as it was released, ImageBind-LLM.

They are zero-init attention with other settings (`zinit.methods.defaults`), which options override.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from zinit.config import AdapterConfig
from zinit.errors import ConfigError
from zinit.methods import defaults
from zinit.methods.base import Adapted, ApplyContext
from zinit.methods.prefix import ZeroInit
from zinit.methods.settings import StageSettings

LATE = "late"  # V2's part of learned prompts


class V1Multimodal(ZeroInit):
    """LLaMA-Adapter with images (ICLR 2024, Eq. 9 and 10): the image's projected token is added to every prompt."""

    name = "v1-multimodal"
    defaults, demos = defaults.V1_MULTIMODAL, defaults.FLAGS


class V2(ZeroInit):
    """LLaMA-Adapter V2 (arXiv 2304.15010): early fusion of visual tokens, late prompts, bias tuning."""

    name = "v2"
    defaults, demos = defaults.V2, defaults.FLAGS

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        """The late prompts go to all layers but those of the early ones (paper: 31 of 32), unless told otherwise."""
        parts = dict(context.attached.parts)
        late = parts.get(LATE)
        if context.saved is None and late is not None and late.layers is None:
            early = {layer for part in parts.values() if isinstance(part.layers, tuple) for layer in part.layers}
            towers = Counter(site.tower for site in context.sites(model))
            parts[LATE] = replace(late, layers=max(1, min(towers.values()) - len(early)))
            context = replace(context, adapter=replace(context.attached, parts=parts))
        return super().apply(model, context)


class V2Late(ZeroInit):
    """LLaMA-Adapter V2 as released: visual tokens are added to the prompts of all adapted layers; biases, norms."""

    name = "v2-late"
    defaults, demos = defaults.V2_LATE, defaults.FLAGS


class ImageBind(ZeroInit):
    """ImageBind-LLM (arXiv 2309.03905): a vector of any sense is added to the one prompt of every layer; two stages.

    With one prompt there is nothing to attend to: its value, gated, is added at every position. The first stage trains
    the bind network, gates and prompts, the second LoRA, biases and norms (paper, section 3.3); or all of it at once.
    """

    name = "imagebind-llm"
    Config = StageSettings
    defaults, demos = defaults.IMAGEBIND_LLM, defaults.FLAGS_BIND

    def attached(self, adapter: AdapterConfig) -> AdapterConfig:
        """Without a tuning in the first stage, which does not train it."""
        return replace(adapter, tuning=None) if self.config.stage == "bind" else adapter

    def untrained(self) -> tuple[str, ...]:
        return ("gates", "prompts", "source") if self.config.stage == "tuning" else ()

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        if self.config.stage == "tuning" and context.attached.tuning is None:
            raise ConfigError("method.stage=tuning trains the tuning, and there is none: leave out tuning=none.")
        adapted = super().apply(model, context)
        assert adapted.handle is not None
        for role, parameters in adapted.handle.roles().items():
            for parameter in parameters:
                parameter.requires_grad_(role not in self.untrained())
        return adapted
