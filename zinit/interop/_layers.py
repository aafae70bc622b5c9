"""What all formats share: they hold prompts and gates by layer; zinit a `PrefixConfig` and named tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from zinit.adapter.parts import Part
from zinit.adapter.state import state_of
from zinit.backbones import find_backbone
from zinit.backbones.base import AttentionSite
from zinit.compat import uncompiled
from zinit.config import LEARNED, PrefixConfig
from zinit.errors import CheckpointError
from zinit.interop.base import Gate, Imported

if TYPE_CHECKING:
    from zinit.adapter.handle import Handle


def sites_of(model: nn.Module) -> list[AttentionSite]:
    """All attention modules that can take a prefix, lowest layer first; the model may have adapters already."""
    state = state_of(model)
    return list(state.sites.values()) if state else find_backbone(uncompiled(model)).sites(model)


def to_prefix(
    prompts: dict[int, Tensor],
    gates: dict[int, Tensor],
    sites: list[AttentionSite],
    *,
    gate: Gate,
    gate_per: Literal["head", "layer"],
    path: Path,
) -> Imported:
    """Checks prompts and gates by absolute layer against the model, and names them as zinit does.

    Args:
        prompts: {layer: (K, C)}.
        gates: {layer: any shape that holds H numbers, or one}; layers without prompts are ignored.
        sites: of the model.
        gate: how the stored gates are squashed.
        gate_per: "head" for H numbers, "layer" for one.
        path: for messages.

    Raises:
        CheckpointError: naming what was found and what was expected.
    """
    depth = max(prompts) + 1
    if depth != len(sites):
        raise CheckpointError(
            f"{path} was made for a model of {depth} layers (its topmost prompt is in layer {depth - 1}), "
            f"but this model has {len(sites)}."
        )
    for layer, prompt in sorted(prompts.items()):
        _check_prompt(prompt, layer, sites[layer], path)
    lengths = {prompt.shape[0] for prompt in prompts.values()}
    if len(lengths) > 1:
        raise CheckpointError(f"{path} has prompts of different lengths, {sorted(lengths)}. Expected one length.")
    tensors: dict[str, Tensor] = {}
    for layer, prompt in sorted(prompts.items()):
        site = sites[layer]
        count = site.num_heads if gate_per == "head" else 1
        stored = _check_gate(gates.get(layer), layer, site, count, path)
        # Copies: the file is memory-mapped.
        tensors[f"{site.name}.prompt.weight"] = prompt.to(torch.float32, copy=True)
        tensors[f"{site.name}.gate"] = stored.reshape(count).to(torch.float32, copy=True)
    layers = tuple(sorted(prompts))
    config = PrefixConfig(
        length=lengths.pop(),
        layers=len(layers) if layers == tuple(range(len(sites) - len(layers), len(sites))) else layers,
        gate=gate,
        gate_per=gate_per,
    )
    return config, tensors


def _check_prompt(prompt: Tensor, layer: int, site: AttentionSite, path: Path) -> None:
    if prompt.dim() != 2 or prompt.shape[1] != site.width:
        raise CheckpointError(
            f"{path} has prompts of shape {tuple(prompt.shape)} in layer {layer}, but this model takes "
            f"(K, {site.width}): the adapter was made for another width."
        )


def _check_gate(gate: Tensor | None, layer: int, site: AttentionSite, count: int, path: Path) -> Tensor:
    """The gate, which must hold ``count`` numbers along one axis."""
    if gate is None:
        raise CheckpointError(f"{path} has prompts but no gate for layer {layer}.")
    if gate.numel() != count or (gate.dim() and max(gate.shape) != count):
        raise CheckpointError(
            f"{path} has a gate of shape {tuple(gate.shape)} in layer {layer}. Expected {count} number(s): "
            f"this model has {site.num_heads} heads."
        )
    return gate


@dataclass(frozen=True)
class LayerOfPrompts:
    """One adapted layer to export: ``prompt`` (K, C), ``gate`` (H,) as stored, and ``effective`` (H,) after squashing.

    Without gating both gates are ones. ``squashed`` is whether tanh makes one of the other.
    """

    site: AttentionSite
    prompt: Tensor
    gate: Tensor
    effective: Tensor
    squashed: bool


def plain_config(handle: Handle, format: str) -> PrefixConfig:
    """The settings of an adapter that is one prefix.

    Raises:
        CheckpointError: if it has several parts, images or a tuning.
    """
    config = handle.config
    if not isinstance(config, PrefixConfig):
        raise cannot(format, "it has several parts, images or a tuning, and the format holds one prefix")
    return config


def topmost_layers(
    handle: Handle, format: str, part: Part | None = None, *, prompt: str = "table"
) -> list[LayerOfPrompts]:
    """Prompts and gates of the topmost layers, lowest first: for formats that have no list of layers.

    Args:
        handle: the adapter.
        format: for messages.
        part: of it; None is an adapter that is nothing else.
        prompt: where the part's prompts come from.

    Raises:
        CheckpointError: if the adapter has another form; the message says why.
    """
    config = plain_config(handle, format) if part is None else part.config
    if config.prompt != prompt:
        raise cannot(format, f"its prompts come from {config.prompt!r}, and it holds those of {prompt!r}")
    if config.gate == "query":
        raise cannot(format, "its gates depend on the query, and the format's are one number for a head")
    every, prefixes = list(handle.state.sites.values()), handle.prefixes if part is None else part.prefixes
    sites = [site for site in every if site.name in prefixes]
    if config.parametrization != "prompt":
        learned = LEARNED[config.parametrization]
        raise cannot(
            format, f"it learns {learned} directly, and the format holds prompts: parametrization='prompt' trains them"
        )
    if not config.separate_softmax:
        raise cannot(
            format, "its prompts share one softmax with the words, and the format's prompts have a softmax of their own"
        )
    if sites != every[-len(sites) :]:
        raise cannot(
            format,
            f"it adapts layers {list(config.layers) if isinstance(config.layers, tuple) else config.layers} "
            f"of {len(every)}, and the format holds the topmost layers only, without a gap",
        )
    layers = []
    for site in sites:
        prefix = prefixes[site.name]
        tensors = {name: value.detach().to("cpu", torch.float32) for name, value in prefix.named_parameters()}
        if not tensors.keys() <= {"prompt.weight", "gate"}:
            raise cannot(format, f"its prompts come from {type(prefix.prompt).__name__}, and the format holds a table")
        effective = prefix.gates().detach().to("cpu", torch.float32).contiguous()
        gate = tensors["gate"].expand(site.num_heads).contiguous() if "gate" in tensors else effective
        squashed = config.gating and config.gate == "tanh"
        table = prefix.prompt().detach().to("cpu", torch.float32)
        layers.append(LayerOfPrompts(site, table, gate, effective, squashed))
    return layers


def model_type(handle: Handle) -> str:
    """The name of the model's family: other implementations support certain families only."""
    return getattr(getattr(handle.model, "config", None), "model_type", type(handle.model).__name__)


def cannot(format: str, reason: str) -> CheckpointError:
    """The error for an adapter that a format cannot express."""
    return CheckpointError(f"this adapter cannot be written as {format}: {reason}. Save it in zinit's own format.")
