"""Bottleneck adapters (Houlsby et al., ICML 2019), one after each attention sub-layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.methods.settings import BottleneckSettings


class BottleneckLayer(nn.Module):
    """h + W_up gelu(W_down h), with W_up = 0 at the start: the model is unchanged until it is trained.

    Args:
        width: C.
        bottleneck: width of the middle.
        generator: for W_down.
    """

    def __init__(self, width: int, bottleneck: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.enabled = True
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.zero_()
            self.down.weight.normal_(std=width**-0.5, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not self.enabled:
            return hidden
        return hidden + self.up(F.gelu(self.down(hidden.to(self.up.weight.dtype)))).to(hidden.dtype)


class Bottleneck(Method):
    """A bottleneck adapter after each attention sub-layer (the first of Houlsby et al.'s two per layer)."""

    name = "bottleneck"
    default_rates = rates.BOTTLENECK
    Config = BottleneckSettings

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed)
        layers: list[BottleneckLayer] = []
        for site in context.sites(model):
            layer = BottleneckLayer(site.width, self.config.width, generator)
            site.module.add_module("bottleneck", layer.to(next(site.module.parameters()).device))
            site.module.register_forward_hook(_through)
            layers.append(layer)

        @contextmanager
        def disabled() -> Iterator[None]:
            for layer in layers:
                layer.enabled = False
            try:
                yield
            finally:
                for layer in layers:
                    layer.enabled = True

        return Adapted(model=model, disabled=disabled)


def _through(host: Any, args: tuple[Any, ...], output: Any) -> Any:
    """The host's output, the first of several, through its adapter."""
    if isinstance(output, Tensor):
        return host.bottleneck(output)
    return (host.bottleneck(output[0]), *output[1:])
