"""The family's methods with images: V1's, V2's as its paper describes it, and V2's as it was released.

They are zero-init attention with other settings (`zinit.methods.defaults`), which options override.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from zinit.methods import defaults
from zinit.methods.base import Adapted, ApplyContext
from zinit.methods.prefix import ZeroInit

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
