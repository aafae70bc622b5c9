"""LoRA (Hu et al., ICLR 2022) through PEFT: on the query and value projections, or on every linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import linears_of
from zinit.errors import ConfigError
from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method
from zinit.methods.settings import LoraSettings


class Lora(Method):
    """Low-rank updates of the query and value projections (of the fused projection where there is one)."""

    name = "lora"
    default_rates = rates.LORA
    Config = LoraSettings

    def targets(self, model: nn.Module, context: ApplyContext) -> list[str]:
        """Full names of the layers that are updated."""
        return [target for site in context.sites(model) for target in _targets(site)]

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        model.requires_grad_(False)
        settings = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=self.targets(model, context),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            inject_adapter_in_model(settings, model)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

        @contextmanager
        def disabled() -> Iterator[None]:
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)

        return Adapted(model=model, disabled=disabled)


class LoraAll(Lora):
    """The same on every linear layer of the blocks: attention and MLP (QLoRA: Dettmers et al., NeurIPS 2023)."""

    name = "lora-all"

    def targets(self, model: nn.Module, context: ApplyContext) -> list[str]:
        sites = context.sites(model)
        for site in sites:
            _targets(site)  # refuses attention that reads a projection's weights without calling it
        return list(linears_of(model, sites, ["all"]))


def _targets(site: AttentionSite) -> list[str]:
    """Full names of the projections of one attention module that make queries and values; else all linear ones."""
    if site.query_value is None:
        raise ConfigError(
            f"LoRA would change nothing in {site.name}: {type(site.module).__name__} reads the weights of its "
            f"projection without calling the layer. Take another method (zinit ls methods), or another host."
        )
    linear = [name for name, part in site.module.named_modules() if name and hasattr(part, "out_features")]
    parts = [name for name in site.query_value if name in linear] or linear
    if not parts:
        raise ConfigError(f"{site.name} has no linear projections that LoRA could update.")
    return [f"{site.name}.{part}" for part in parts]
