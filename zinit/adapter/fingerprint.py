"""What tells one pretrained model from another: its family, the shape of its layers, a sample of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zinit.adapter.scopes import prompts_of
from zinit.backbones.base import AttentionSite
from zinit.compat import commit_hash, name_or_path
from zinit.distributed import is_shard

PROBE = 64  # numbers kept of a projected probe vector


def fingerprint(model: nn.Module, sites: list[AttentionSite]) -> dict[str, Any]:
    """What an adapter must find again: the family, the number and shape of the layers, and a sample of the weights."""
    config = getattr(model, "config", None)
    first = sites[0]
    towers: dict[str, list[AttentionSite]] = {}
    for site in sites:
        towers.setdefault(site.tower, []).append(site)
    several = {tower: [len(own), own[0].width] for tower, own in towers.items()} if len(towers) > 1 else None
    return {
        "type": getattr(config, "model_type", type(model).__name__),
        "num_layers": len(sites),
        **first.shape(),
        **({} if several is None else {"towers": several}),
        "key_probe": _key_probe(first),
        "name_or_path": name_or_path(config) or "",
        "revision": commit_hash(config),
    }


@torch.no_grad()
def _key_probe(site: AttentionSite) -> list[float] | None:
    """Some of the keys that the first site makes of a fixed vector; None where there are no weights to ask."""
    weight = next(site.module.parameters())
    if weight.device.type == "meta" or any(map(is_shard, site.module.parameters())):
        return None
    vector = torch.randn(1, site.width, generator=torch.Generator().manual_seed(0))
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    with prompts_of(""):  # the base's keys, whatever tuning is on
        key, _ = site.project_kv(site.module, vector.to(weight.device, dtype))
    return [round(number, 4) for number in key.flatten()[:PROBE].float().tolist()]


def cosine(ours: list[float], theirs: Any) -> float:
    """How far two samples of weights agree; 0 where there is nothing to compare."""
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return 0.0
    try:
        return torch.cosine_similarity(torch.tensor(ours), torch.tensor(theirs), dim=0).item()
    except (TypeError, ValueError, RuntimeError):  # no numbers
        return 0.0
