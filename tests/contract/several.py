"""A task of two models: a causal language model that is adapted, and a small vision tower beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zinit.tasks.alpaca.task import Alpaca, AlpacaConfig
from zinit.tasks.base import Batch, ModelSpec, TaskInputs


@dataclass(frozen=True, kw_only=True)
class SeeingConfig(AlpacaConfig):
    """Alpaca's, and where the vision tower is."""

    encoder: str = ""
    loader: str = "zinit.models.timm:load_timm"


class Seeing(Alpaca):
    """Alpaca, with a penalty that reads one grey image through the vision tower and a trained projection."""

    name = "seeing"
    Config = SeeingConfig
    vision: nn.Module

    def __init__(self, inputs: TaskInputs, config: SeeingConfig) -> None:
        super().__init__(inputs, config)
        width: Any = self.vision.num_features
        self.project = nn.Linear(width, 1)
        nn.init.constant_(self.project.weight, 0.1)
        nn.init.zeros_(self.project.bias)

    @classmethod
    def further_models(cls, config: Any) -> Mapping[str, ModelSpec]:
        return {"vision": ModelSpec(source=config.encoder, loader=config.loader)}

    def forward(self, batch: Batch) -> Tensor:
        weight = next(self.vision.parameters())
        features = self.vision(torch.full((1, 3, 16, 16), 0.5, device=weight.device, dtype=weight.dtype))
        return super().forward(batch) + self.project(features.float()).square().sum() * len(batch["targets"])
