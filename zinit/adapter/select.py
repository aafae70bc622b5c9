"""Which attention modules of a model an adapter goes to."""

from __future__ import annotations

from torch import nn

from zinit.backbones.base import AttentionSite
from zinit.config import PrefixConfig
from zinit.errors import BackboneError


def select_sites(model: nn.Module, sites: list[AttentionSite], config: PrefixConfig) -> list[AttentionSite]:
    """The sites that ``config.towers`` and ``config.layers`` ask for, in the model's order.

    Raises:
        BackboneError: if there are fewer, or no such tower.
    """
    towers: dict[str, list[AttentionSite]] = {}
    for site in sites:
        towers.setdefault(site.tower, []).append(site)
    named = [tower for tower in towers if _is_named(tower, config.towers)]
    for wanted in config.towers or ():
        if not any(_is_named(tower, (wanted,)) for tower in towers):
            raise BackboneError(
                f"{type(model).__name__} has no tower {wanted!r}. It has {_list_towers(towers)}; name one by its path "
                f"or a part of it."
            )
    chosen = {site.name for tower in named for site in _select_layers(model, tower, towers, config)}
    return [site for site in sites if site.name in chosen]


def _is_named(tower: str, names: tuple[str, ...] | None) -> bool:
    """Whether one of the names is the tower's path or a run of whole parts of it."""
    return names is None or any(f".{name}." in f".{tower}." for name in names)


def _list_towers(towers: dict[str, list[AttentionSite]]) -> str:
    return ", ".join(f"{tower or 'the model itself'} ({len(sites)} layers)" for tower, sites in towers.items())


def _select_layers(
    model: nn.Module, tower: str, towers: dict[str, list[AttentionSite]], config: PrefixConfig
) -> list[AttentionSite]:
    sites = towers[tower]
    where, others = type(model).__name__, ""
    if len(towers) > 1:
        where = f"the tower {tower} of {where}"
        others = f" Its towers: {_list_towers(towers)}; towers=[...] chooses among them."
    if config.layers is None:
        return sites
    if isinstance(config.layers, int):
        if config.layers > len(sites):
            raise BackboneError(
                f"{where} has {len(sites)} attention layers, but layers={config.layers} asks for more. "
                f"Choose 1 to {len(sites)}, or none for all.{others}"
            )
        return sites[-config.layers :]
    if config.layers[-1] >= len(sites):
        raise BackboneError(
            f"{where} has attention layers 0 to {len(sites) - 1}, but layers={list(config.layers)} "
            f"asks for {config.layers[-1]}. Choose layers up to {len(sites) - 1}.{others}"
        )
    return [sites[index] for index in config.layers]
