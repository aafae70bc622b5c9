"""The modules of an adapter, made from its settings; and how they get onto a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from zinit.adapter import bias_tuning, excitor  # noqa: F401 - they register what `build_tuning` makes
from zinit.adapter import tuning as tunings
from zinit.adapter.calls import unwatch_calls, watch_calls
from zinit.adapter.parts import Part
from zinit.adapter.recompute import unwatch
from zinit.adapter.select import select_sites
from zinit.adapter.sources import SharedPrompts, make_shared
from zinit.adapter.state import AdapterState
from zinit.adapter.tuning import Tuning, build_tuning
from zinit.backbones.base import AttentionSite, PrefixSlot
from zinit.config import ONLY, AdapterConfig, PrefixConfig
from zinit.errors import ConfigError
from zinit.prefix import PromptSource, ZeroGatedPrefix

ROOT = "zinit"  # the model's child that holds what layers share


@dataclass(frozen=True, kw_only=True)
class AdapterModules:
    """Everything that an adapter learns.

    Attributes:
        parts: by name, in the order of the settings.
        shared: what several layers use: "hyper" and "deepshare" make prompts, "context" makes each sample's context.
        tuning: of the host's own modules, if there is one.
    """

    parts: dict[str, Part]
    shared: dict[str, nn.Module]
    tuning: Tuning | None

    def prefixes(self) -> dict[str, ZeroGatedPrefix]:
        """{site: prefix}; {"part.site": prefix} where there are several parts."""
        return {_name(part, site): prefix for part in self.parts.values() for site, prefix in part.prefixes.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("model.layers.7.self_attn.gate", parameter) and so on: by part, then what is shared, then the tuning."""
        for name, prefix in self.prefixes().items():
            for own, parameter in prefix.named_parameters():
                yield f"{name}.{own}", parameter
        modules = {f"shared.{role}": module for role, module in self.shared.items()}
        for name, module in (modules | ({} if self.tuning is None else {"tuning": self.tuning})).items():
            for own, parameter in module.named_parameters():
                yield f"{name}.{own}", parameter


def _name(part: Part, site: str) -> str:
    return site if part.name == ONLY else f"{part.name}.{site}"


def slot_key(adapter: str, part: str) -> str:
    """The name of a part's prefix in a slot."""
    return adapter if part == ONLY else f"{adapter}__{part}"


def build_modules(
    config: AdapterConfig,
    model: nn.Module,
    sites: Sequence[AttentionSite],
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> AdapterModules:
    """What an adapter learns, fresh.

    Args:
        config: the adapter's.
        model: the host; it is not changed.
        sites: its attention modules.
        device: where the parameters live; default: beside each host's weights.
        generator: for the random start; drawn from site by site, the prompt before the gate.

    Raises:
        BackboneError: if the model has fewer layers than asked for.
        ConfigError: if parts cannot share what they ask for.
    """
    chosen = {name: select_sites(model, list(sites), part) for name, part in config.parts.items()}
    number = {site.name: index for index, site in enumerate(sites)}
    widths = {site.name: site.width for name, own in chosen.items() if _shares(config.parts[name]) for site in own}
    where = torch.device(_device_of(sites[0].module) if device is None else device)
    shared = make_shared(config, layers=len(sites), widths=widths, generator=generator, device=where)
    for module in shared.values():
        module.to(where)
    declared = any(part.prompt != "table" for part in config.parts.values())

    def source(part: PrefixConfig, site: AttentionSite) -> PromptSource | None:
        return SharedPrompts(shared[part.prompts], number[site.name]) if part.prompts in shared else None

    def prefix(part: PrefixConfig, site: AttentionSite) -> ZeroGatedPrefix:
        beside = _device_of(site.module) if device is None else device
        return ZeroGatedPrefix(part, **site.shape(), device=beside, generator=generator, prompts=source(part, site))

    parts = {
        name: Part(
            name=name,
            config=part,
            takes_context=part.parametrization == "prompt" and (part.prompt != "table" or not declared),
            prefixes={site.name: prefix(part, site) for site in chosen[name]},
        )
        for name, part in config.parts.items()
    }
    towers = {site.tower for own in chosen.values() for site in own} or {site.tower for site in sites}
    tuned = [site for site in sites if site.tower in towers]
    asked = config.excitor or config.tuning
    tuning = None if asked is None else build_tuning(asked, model, tuned, device=device, generator=generator)
    return AdapterModules(parts=parts, shared=shared, tuning=tuning)


def _shares(part: PrefixConfig) -> bool:
    return part.prompts != "table" or part.prompt != "table"


def install(state: AdapterState, adapter: str, modules: AdapterModules) -> None:
    """Puts an adapter's modules onto the model. If anything is wrong nothing has been changed.

    Raises:
        ConfigError: if the model's root has no room for what layers share.
    """
    if modules.shared or modules.tuning is not None:
        _check_root(state.model)
    needed = {site: None for part in modules.parts.values() for site in part.prefixes}
    with ExitStack() as undo:  # an installation that fails takes the earlier ones back
        undo.callback(unwatch, state)
        undo.callback(unwatch_calls, state)
        for name in needed:
            if name not in state.slots:
                site = state.sites[name]
                slot = PrefixSlot(site.project_kv, name, state)
                state.backbone.install(state.model, site, slot)
                undo.callback(state.uninstall, site)
                state.slots[name] = slot
                watch_calls(state, name)
        undo.pop_all()
    # From here on nothing fails.
    state.watches_blocks = False  # there may be new ones
    for part in modules.parts.values():
        key = slot_key(adapter, part.name)
        for name, prefix in part.prefixes.items():
            slot = state.slots[name]
            slot[key] = prefix
            slot.members[adapter] = (*slot.members.get(adapter, ()), key)
    owned = modules.shared | ({} if modules.tuning is None else {"tuning": modules.tuning})
    if owned:
        if not hasattr(state.model, ROOT):
            state.model.add_module(ROOT, nn.ModuleDict())
        state.model.get_submodule(ROOT).add_module(adapter, nn.ModuleDict(owned))
    if modules.tuning is not None or state.tuned:
        tunings.install(state, adapter, modules.tuning)
        for module in state.tuned:
            watch_calls(state, module)


def uninstall(state: AdapterState, adapter: str) -> None:
    """Takes all of an adapter off the model again."""
    tunings.uninstall(state, adapter)
    for name, slot in list(state.slots.items()):
        for key in slot.members.pop(adapter, ()):
            del slot[key]
        if not len(slot):
            state.uninstall(state.sites[name])
    unwatch(state)
    unwatch_calls(state)
    root = getattr(state.model, ROOT, None)
    if type(root) is nn.ModuleDict and adapter in root:
        del root[adapter]
        if not len(root):
            delattr(state.model, ROOT)


def _check_root(model: nn.Module) -> None:
    if isinstance(getattr(model, ROOT, None), PrefixSlot):
        raise ConfigError(
            f"this {type(model).__name__} is an attention module itself and has no room for what layers share. Attach "
            f"to the model that it is a part of."
        )


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
