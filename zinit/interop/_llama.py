"""Where other implementations' names for a LLaMA's linear layers and norms are in transformers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import block_of
from zinit.config import AdapterConfig, PrefixConfig, TuningConfig
from zinit.errors import CheckpointError

QUERY, KEY, VALUE, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
LINEARS = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


class LlamaPaths:
    """The paths of a model's linear layers and norms, if it is laid out like LLaMA.

    Raises:
        CheckpointError: if it is not.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite], path: Path | str) -> None:
        self.blocks = [block_of(site, sites) for site in sites]
        inside = dict(model.get_submodule(self.blocks[0]).named_modules())
        self.last_norm = self.blocks[0].split(".layers.")[0] + ".norm"
        missing = [name for name in (*LINEARS, ATTENTION_NORM, MLP_NORM) if name not in inside]
        if missing or self.last_norm not in dict(model.named_modules()):
            raise CheckpointError(
                f"{path} tunes the linear layers and norms of a LLaMA, and this {type(model).__name__} is laid out in "
                f"another way: its blocks have no {', '.join(missing) or self.last_norm}."
            )

    def block(self, layer: int, path: Path | str) -> str:
        """The path of a block by its number.

        Raises:
            CheckpointError: if there is none.
        """
        if layer >= len(self.blocks):
            raise CheckpointError(
                f"{path} was made for a model of {layer + 1} or more layers, but this model has {len(self.blocks)}."
            )
        return self.blocks[layer]


def half_split(x: Tensor, head_dim: int) -> Tensor:
    """Output rows (H * D, ...) of Meta's query and key projections, whose rotated pairs are neighbours, in halves."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleaved(x: Tensor, head_dim: int) -> Tensor:
    """The inverse of `half_split`."""
    return x.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def tuned_adapter(
    prefix: tuple[PrefixConfig, dict[str, Tensor]] | None, tuning: TuningConfig, tensors: Mapping[str, Tensor]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A prefix, if there is one, and a tuning as one adapter."""
    config, own = ({}, {}) if prefix is None else ({"prefix": prefix[0]}, prefix[1])
    named = {f"tuning.{name}": tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    return AdapterConfig(parts=config, tuning=tuning), own | named
