"""LLaMA-Excitor (CVPR 2024): prompts that change the attention among words, by a gated addition to their keys."""

from __future__ import annotations

from torch import nn

from zinit.adapter.attach import attach, load
from zinit.config import AdapterConfig, ExcitorConfig
from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method


class Excitor(Method):
    """LLaMA-Excitor, as far as its paper tells; see `zinit.adapter.excitor` for what of it is ours."""

    name = "excitor"
    Config = ExcitorConfig
    default_rates = rates.ZERO_INIT

    def attached(self, adapter: AdapterConfig) -> AdapterConfig:
        return AdapterConfig(parts={}, excitor=self.config)

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        if context.saved is not None:
            handle = load(model, context.saved)
        else:
            config = self.attached(context.attached)
            handle = attach(model, config, backbone=context.backbone, seed=context.seed)
        return Adapted(model=model, handle=handle, disabled=handle.disabled)
