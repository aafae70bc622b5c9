"""What several attention modules share of their prompts. An adapter owns it once; each module only asks it.

Networks that make the tables of all layers (`NETWORKS`), and modules that make each sample's context of features
(`ContextSource`, by name in `SOURCES`).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.encoding import Encoder
from zinit.adapter.registries import SOURCES
from zinit.config import AdapterConfig, PrefixConfig
from zinit.errors import ConfigError, first_line
from zinit.prefix import Context, ZeroGatedPrefix
from zinit.registry import did_you_mean

LARGEST = 65_536  # of a size in the options of a context source


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


class DeepShare(nn.Module):
    """An embedding of each prompt of every layer, and one small network for all (arXiv 2502.03029, "deepshare").

    Embedding -> Linear -> ReLU -> Linear, with torch's own start: unlike those of `HyperPrompts` the prompts are no
    smaller than those of a table by orders of magnitude.

    Args:
        layers: of the model.
        length: K; there are K embeddings for each layer.
        width: C.
        hidden: width of the hidden layer.
        embedding: width of the embeddings.
        generator: a CPU generator for the random start.
    """

    def __init__(
        self,
        *,
        layers: int,
        length: int,
        width: int,
        hidden: int = 64,
        embedding: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(layers, length, embedding).normal_(generator=generator))
        self.hidden, self.out = nn.Linear(embedding, hidden), nn.Linear(hidden, width)
        with torch.no_grad():
            for layer in (self.hidden, self.out):
                for tensor in layer.parameters():
                    tensor.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)

    def forward(self, layer: int) -> Tensor:
        """(K, C), the prompts of one layer."""
        return self.out(self.hidden(self.embedding[layer]).relu())


NETWORKS = {"hyper": HyperPrompts, "deepshare": DeepShare}  # what `PrefixConfig.prompts` says besides "table"


class SharedPrompts:
    """One layer's prompts out of a network that the adapter owns.

    Args:
        network: makes the prompts of all layers.
        layer: this one's number among them.
    """

    def __init__(self, network: nn.Module, layer: int) -> None:
        self.network, self.layer = network, layer

    def __call__(self, context: Context | None = None) -> Tensor:
        """(K, C); or (B, K, C) with a context."""
        table = self.network(self.layer)
        return table if context is None else table + context.for_present(context.tokens)


class ContextSource(nn.Module, ABC):
    """Makes each sample's context of its features; one for an adapter, run once per forward or generation.

    Made by ``TheSource(width=C, length=K, **context_options)``.

    Attributes:
        takes: what of `zinit.adapter.encoding.Features` it reads: "tokens", "pooled", "layers".
        layers: of how many encoder layers it wants a vector.
    """

    takes: tuple[str, ...] = ("tokens",)
    layers = 0

    @classmethod
    def options_for(cls, encoder: Encoder, options: dict[str, Any]) -> dict[str, Any]:
        """The options that an encoder settles, where the user has not."""
        return {}

    @abstractmethod
    def forward(self, features: Any) -> Context:
        """Features of B samples, as the source takes them, to their context."""


def with_encoder(config: AdapterConfig, encoder: Encoder) -> AdapterConfig:
    """The settings of an adapter whose context source gets an encoder's features.

    Raises:
        ConfigError: if it has no context source, or one of another width.
    """
    if config.context is None:
        raise ConfigError("an encoder needs a context source that takes its features: context='visual-tokens'.")
    options = config.context_options
    settled = SOURCES.get(config.context).options_for(encoder, options)
    for name, value in settled.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"the encoder {encoder.identity.get('source') or type(encoder).__name__} gives {name}={value}, but the "
                f"context source {config.context!r} was made for {options[name]}: use the encoder it was trained with."
            )
    return replace(config, context_options={**options, **settled})


@contextmanager
def _seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Torch's own generator starts from a draw of this one while inside."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def make_shared(
    config: AdapterConfig,
    *,
    layers: int,
    widths: Mapping[str, int],
    generator: torch.Generator | None,
    device: torch.device,
) -> dict[str, nn.Module]:
    """What an adapter's layers share, by role: a kind of `NETWORKS`, "context", as far as the config asks for it.

    Args:
        config: the adapter's.
        layers: attention modules of the model.
        widths: {site: C} of the sites that ask for something shared.
        generator: for the random start.
        device: where the modules will be.

    Raises:
        ConfigError: if layers that share are of different width, or parts that share of different length.
    """
    made: dict[str, nn.Module] = {}
    lengths = {kind: {part.length for part in config.parts.values() if part.prompts == kind} for kind in NETWORKS}
    taking = {part.length for part in config.parts.values() if part.prompt != "table"}
    if (any(lengths.values()) or config.context) and len(set(widths.values())) > 1:
        raise ConfigError(
            f"layers that share a network of prompts or a context must be of one width; got "
            f"{sorted(set(widths.values()))}. Choose one tower: towers=[...]."
        )
    width = next(iter(widths.values()), 0)
    for kind, own in lengths.items():
        if len(own) > 1:
            raise ConfigError(
                f"parts with prompts={kind!r} share one network: give them one length, not {sorted(own)}."
            )
        if own:
            made[kind] = NETWORKS[kind](layers=layers, length=own.pop(), width=width, generator=generator)
    if config.context is not None:
        if len(taking) != 1:
            raise ConfigError(
                f"context={config.context!r} makes the prompts of the parts with prompt='context' or 'table+context', "
                f"which must be of one length; got {sorted(taking) or 'no such part'}."
            )
        made["context"] = _make_source(config.context, config.context_options, width, taking.pop(), generator, device)
    return made


def as_tables(
    config: PrefixConfig | AdapterConfig, prefixes: Mapping[str, ZeroGatedPrefix], tensors: Mapping[str, Tensor]
) -> tuple[PrefixConfig | AdapterConfig, dict[str, Tensor]]:
    """An adapter's settings and tensors with the tables that its networks make in the place of the networks.

    Args:
        config: the adapter's.
        prefixes: all of it, by name.
        tensors: all of its tensors.
    """
    whole = AdapterConfig.of(config)
    plain = replace(whole, parts={name: replace(part, prompts="table") for name, part in whole.parts.items()})
    of_networks = tuple(f"shared.{kind}." for kind in NETWORKS)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(of_networks)}
    made = {
        f"{name}.prompt.weight": prefix.prompt().detach()
        for name, prefix in prefixes.items()
        if prefix.config.prompts != "table"
    }
    return plain.simplest() if isinstance(config, PrefixConfig) else plain, made | kept


def _make_source(
    name: str, options: dict[str, Any], width: int, length: int, generator: torch.Generator | None, device: torch.device
) -> ContextSource:
    source = SOURCES.get(name)
    known = list(inspect.signature(source).parameters.values())
    needed = [p.name for p in known if p.default is p.empty and p.name not in ("width", "length", *options)]
    names = [p.name for p in known if p.name not in ("width", "length")]
    for option in options:
        if option not in names:
            raise ConfigError(f"the context source {name!r} has no setting {option!r}.{did_you_mean(option, names)}")
        if type(options[option]) in (int, float) and not 0 < options[option] <= LARGEST:
            raise ConfigError(
                f"{option} of the context source {name!r} must be above 0 and at most {LARGEST:,}; got "
                f"{options[option]!r}."
            )
    if needed:
        raise ConfigError(
            f"the context source {name!r} needs {', '.join(needed)}: name the encoder (encoder=..., --encoder), or "
            f"give them in context_options (-o context.{needed[0]}=...)."
        )
    try:
        # On the meta device nothing is allocated: sizes out of a file are compared with its tensors first.
        with _seeded(generator), torch.device(device if device.type == "meta" else "cpu"):
            return source(width=width, length=length, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"the context source {name!r} cannot be made of {options}: {first_line(error)}") from error
