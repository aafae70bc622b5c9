"""Lightning-AI/litgpt, ``adapter`` (version 1). Version 2 is in `zinit.interop.litgpt_v2`.

``lit_model.pth.adapter``: a dictionary under ``model`` with ``transformer.h.{l}.attn.adapter_wte.weight`` (K, C) and
``.gating_factor`` for each adapted layer l. The gate is per head and not squashed: (1, 1, H, 1) since August 2023,
(1, H, 1, 1) before, one number in the first weeks.

Version 0.5.5 reordered the fused query-key-value projection from one block per group to all queries, all keys, all
values, but its prompt branch still splits it by group. So it trains against tensors that are not the host's keys and
values (most of them are queries). A file does not say which version made it: the user must.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zinit.adapter.scopes import prompts_of
from zinit.adapter.select import select_sites
from zinit.backbones.base import AttentionSite
from zinit.errors import CheckpointError
from zinit.interop._files import adapter_tensors, read_pickle, tensors_in
from zinit.interop._layers import sites_of, to_prefix
from zinit.interop.base import Format, Gate, Imported

PROMPT, GATE = ".attn.adapter_wte.weight", ".attn.gating_factor"
_LAYER = re.compile(r"transformer\.h\.(\d{1,6})")


def read_legacy(path: Path, model: nn.Module, *, length: int, gate: Gate) -> Imported:
    """Reads a file of a version before 0.5.5. ``length`` and ``gate`` are unused: the file and LitGPT fix them.

    Raises:
        CheckpointError: if the file is damaged, of another kind (such as adapter_v2), or does not fit the model.
    """
    return _read(path, sites_of(model), "litgpt-legacy")


def read(path: Path, model: nn.Module, *, length: int, gate: Gate) -> Imported:
    """Reads a file of version 0.5.5 or later as learned keys and values: those its prompts had in training.

    Raises:
        CheckpointError: as `read_legacy`; also if the weights of the model's projections are not available.
    """
    sites = sites_of(model)
    config, tensors = _read(path, sites, "litgpt")
    for site in select_sites(model, sites, config):
        prompt = tensors.pop(f"{site.name}.prompt.weight")
        tensors[f"{site.name}.key"], tensors[f"{site.name}.value"] = fused_rows(site, prompt)
    warn_of_wrong_rows(path, "litgpt-legacy")
    return dataclasses.replace(config, parametrization="key_value"), tensors


def warn_of_wrong_rows(path: Path, legacy: str) -> None:
    """Says what became of the prompts of a file of version 0.5.5 or later."""
    warnings.warn(
        f"{path}: LitGPT 0.5.5 and later reads a prompt's keys and values from the wrong rows of the fused projection. "
        f"The adapter was imported as learned keys and values computed from those rows: it gives the same outputs, but "
        f"trains on as keys and values, not as prompts. For a file of an older version pass format={legacy!r}.",
        UserWarning,
        stacklevel=4,
    )


def _read(path: Path, sites: list[AttentionSite], format: str) -> Imported:
    tensors = adapter_tensors(tensors_in(read_pickle(path), path, unwrap="model"), path, format)
    return prompts_by_layer(tensors, sites, path)


def prompts_by_layer(tensors: dict[str, Tensor], sites: list[AttentionSite], path: Path) -> Imported:
    """The prompts and gates of both versions' files.

    Raises:
        CheckpointError: if they do not fit the model.
    """
    prompts, gates = _by_layer(tensors, PROMPT), _by_layer(tensors, GATE)
    if not prompts:
        raise CheckpointError(f"{path} has prompts under names that LitGPT does not use. Expected 'transformer.h.0'.")
    scalar = all(value.dim() == 1 for value in gates.values())
    return to_prefix(prompts, gates, sites, gate="identity", gate_per="layer" if scalar else "head", path=path)


@torch.no_grad()
def fused_rows(
    site: AttentionSite, prompt: Tensor, change: Callable[[Tensor], Tensor] = lambda blocks: blocks
) -> tuple[Tensor, Tensor]:
    """The keys and values that LitGPT 0.5.5 and later computes for a prompt, each (G, K, D).

    Args:
        site: whose projections.
        prompt: (K, C).
        change: of what the fused projection gives, (H + 2G, K, D): version 2 scales it.

    The fused projection has H + 2G blocks of D rows, q_1 .. q_H, k_1 .. k_G, v_1 .. v_G. LitGPT reads it as if it were
    stored by group, each with H/G queries, one key and one value: group g's key is block g (H/G + 2) + H/G and its
    value the block after that.
    """
    weight = next(site.module.parameters())
    if site.project_query is None or weight.is_meta:
        raise CheckpointError(
            "importing LitGPT's format needs the weights of the model's query, key and value projections, and they are "
            "not available here. Load the model with its weights."
        )
    tokens = prompt.to(weight.device, weight.dtype if weight.is_floating_point() else torch.get_default_dtype())
    with prompts_of(""):  # the base's
        key, value = site.project_kv(site.module, tokens)
        blocks = torch.cat([site.project_query(site.module, tokens), key, value], dim=1)[0].float().cpu()
    blocks = change(blocks)
    shared_by = site.num_heads // site.num_kv_heads
    first = torch.arange(site.num_kv_heads) * (shared_by + 2) + shared_by
    return blocks[first].contiguous(), blocks[first + 1].contiguous()


def _by_layer(tensors: dict[str, Tensor], suffix: str) -> dict[int, Tensor]:
    return {
        int(layer[1]): value
        for name, value in tensors.items()
        if name.endswith(suffix) and (layer := _LAYER.fullmatch(name.removesuffix(suffix)))
    }


LITGPT = Format("LitGPT 0.5.5 and later, adapter", read, needs_weights=True)
LITGPT_LEGACY = Format("LitGPT before 0.5.5, adapter", read_legacy)
