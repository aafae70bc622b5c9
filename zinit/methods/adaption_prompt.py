"""AdaptionPrompt, PEFT's own implementation of LLaMA-Adapter, on the models that PEFT knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zinit.errors import ConfigError
from zinit.methods import rates
from zinit.methods.base import Adapted, ApplyContext, Method


class AdaptionPrompt(Method):
    """PEFT's AdaptionPrompt with the run's ``prefix.length`` and ``prefix.layers``; its other settings are fixed."""

    name = "adaption-prompt"
    default_rates = rates.ADAPTION_PROMPT

    def apply(self, model: nn.Module, context: ApplyContext) -> Adapted:
        from peft import AdaptionPromptConfig
        from peft.tuners.adaption_prompt import AdaptionPromptModel
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if kind not in TRANSFORMERS_MODEL_CONFIG:
            raise ConfigError(
                f"PEFT's AdaptionPrompt knows {', '.join(TRANSFORMERS_MODEL_CONFIG)}, and this is {kind}. "
                f"Its recipe runs on any model: -o method=adaption-prompt-recipe."
            )
        layers = context.prefix.layers
        if isinstance(layers, tuple):
            raise ConfigError(f"AdaptionPrompt takes how many of the topmost layers, not which; got layers={layers}.")
        settings = AdaptionPromptConfig(
            adapter_len=context.prefix.length, adapter_layers=layers or len(context.sites(model))
        )
        host: Any = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            wrapper: Any = AdaptionPromptModel(host, {"default": settings}, "default")

        @contextmanager
        def disabled() -> Iterator[None]:
            wrapper.disable_adapter_layers()
            try:
                yield
            finally:
                wrapper.enable_adapter_layers()

        return Adapted(model=model, disabled=disabled)
