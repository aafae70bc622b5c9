"""What zinit did to one model, and what of its prefixes is computed ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from zinit.backbones.base import AttentionSite, Backbone, PrefixSlot
from zinit.distributed import is_shard
from zinit.errors import ConfigError

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle

ATTRIBUTE = "_zinit"


@dataclass
class Attachment:
    """What zinit did to one model: enough to undo all of it. Lives on the model, shared by its adapters."""

    backbone: Backbone
    sites: dict[str, AttentionSite]
    handles: dict[str, Handle] = field(default_factory=dict)
    slots: dict[str, PrefixSlot] = field(default_factory=dict)
    trained_before: list[nn.Parameter] = field(default_factory=list)
    wraps_generate: bool = False
    generations: int = 0
    routes: int = 0

    def check_no_route(self, what: str) -> None:
        """Adapters neither come nor go inside `Handle.route`.

        Raises:
            ConfigError: if a route is open.
        """
        if self.routes:
            raise ConfigError(f"{what} cannot be done inside handle.route(...). Leave that scope first.")

    def uninstall(self, model: nn.Module, site: AttentionSite) -> None:
        """Takes the slot of one attention module away."""
        self.backbone.uninstall(model, site)
        self.slots.pop(site.name, None)

    def _dtype(self) -> torch.dtype:
        """Of the model's first weight that is no integer."""
        models = (handle.model for handle in self.handles.values())
        floating = (p.dtype for model in models for p in model.parameters() if p.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @contextmanager
    def frozen_prefix(self) -> Iterator[None]:
        """See `Handle.frozen_prefix`. Scopes nest; what the outermost ends is kept no longer."""
        self.generations += 1
        try:
            for name, slot in self.slots.items():
                if slot.frozen is None:
                    _freeze(slot, self.sites[name].module, self._dtype())
            yield
        finally:
            self.generations -= 1
            if self.generations == 0:
                for slot in self.slots.values():
                    slot.frozen = None


@torch.no_grad()
def _freeze(slot: PrefixSlot, host: nn.Module, default: torch.dtype) -> None:
    prefix = slot.prefix()
    weights = [p for name, p in host.named_parameters() if not name.startswith("zinit.")]
    if prefix is None or any(map(is_shard, weights)):
        return  # sharded weights are whole only inside the host's own forward
    floating = [weight.dtype for weight in weights if weight.is_floating_point()]
    dtype = floating[0] if floating else default  # all of a quantised module's weights may be integers
    slot.frozen = slot.keys_values(host, prefix, dtype)
