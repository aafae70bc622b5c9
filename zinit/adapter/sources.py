"""What several attention modules share of their prompts. An adapter owns it once; each module only asks it.

A network that makes the tables of all layers (`HyperPrompts`), and modules that make each sample's context of features
(`ContextSource`, by name in `SOURCES`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zinit.config import AdapterConfig
from zinit.errors import ConfigError
from zinit.prefix import Context
from zinit.registry import Registry

SOURCES = Registry("context source", {}, group="zinit.sources")


class HyperPrompts(nn.Module):
    """Makes the prompts of every layer of one small network (arXiv 2502.03029): e_l -> Linear -> ReLU -> Linear.

    The last layer starts near zero, so the prompts do too (standard deviation 6e-6 at C = 4096, K = 10).

    Args:
        layers: of the model; each has an embedding.
        length: K.
        width: C.
        hidden: width of the embeddings and of the hidden layer.
        generator: a CPU generator for the random start.
    """

    def __init__(
        self, *, layers: int, length: int, width: int, hidden: int = 64, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.length, self.width = length, width
        self.embedding = nn.Parameter(torch.empty(layers, hidden).normal_(generator=generator))
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, length * width)
        with torch.no_grad():
            bound = hidden**-0.5
            for tensor in (self.hidden.weight, self.hidden.bias):
                tensor.uniform_(-bound, bound, generator=generator)
            bound = 1e-3 * (3 / (hidden * width)) ** 0.5
            self.out.weight.uniform_(-bound, bound, generator=generator)
            self.out.bias.zero_()

    def forward(self, layer: int) -> Tensor:
        """(K, C), the prompts of one layer."""
        return self.out(self.hidden(self.embedding[layer]).relu()).view(self.length, self.width)


class SharedPrompts:
    """One layer's prompts out of a network that the adapter owns.

    Args:
        network: makes the prompts of all layers.
        layer: this one's number among them.
    """

    def __init__(self, network: HyperPrompts, layer: int) -> None:
        self.network, self.layer = network, layer

    def __call__(self, context: Context | None = None) -> Tensor:
        """(K, C); or (B, K, C) with a context."""
        table = self.network(self.layer)
        return table if context is None else table + context.for_present(context.tokens)


class ContextSource(nn.Module, ABC):
    """Makes each sample's context of its features; one for an adapter, run once per forward or generation.

    Made by ``TheSource(width=C, length=K, generator=..., **context_options)``.
    """

    @abstractmethod
    def forward(self, features: Any) -> Context:
        """Features of B samples, as the source takes them, to their context."""


def make_shared(
    config: AdapterConfig, *, layers: int, widths: Mapping[str, int], generator: torch.Generator | None
) -> dict[str, nn.Module]:
    """What an adapter's layers share, by role: "hyper", "context", as far as the config asks for it.

    Args:
        config: the adapter's.
        layers: attention modules of the model.
        widths: {site: C} of the sites that ask for something shared.
        generator: for the random start.

    Raises:
        ConfigError: if layers that share are of different width, or parts that share of different length.
    """
    made: dict[str, nn.Module] = {}
    hyper = {part.length for part in config.parts.values() if part.prompts == "hyper"}
    taking = {part.length for part in config.parts.values() if part.prompt != "table"}
    if (hyper or config.context) and len(set(widths.values())) > 1:
        raise ConfigError(
            f"layers that share a network of prompts or a context must be of one width; got "
            f"{sorted(set(widths.values()))}. Choose one tower: towers=[...]."
        )
    width = next(iter(widths.values()), 0)
    if hyper:
        if len(hyper) > 1:
            raise ConfigError(
                f"parts with prompts='hyper' share one network: give them one length, not {sorted(hyper)}."
            )
        made["hyper"] = HyperPrompts(layers=layers, length=hyper.pop(), width=width, generator=generator)
    if config.context is not None:
        if len(taking) != 1:
            raise ConfigError(
                f"context={config.context!r} makes the prompts of the parts with prompt='context' or 'table+context', "
                f"which must be of one length; got {sorted(taking) or 'no such part'}."
            )
        source = SOURCES.get(config.context)
        made["context"] = source(width=width, length=taking.pop(), generator=generator, **config.context_options)
    return made
