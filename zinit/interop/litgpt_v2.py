"""Lightning-AI/litgpt, ``adapter_v2``: prompts and gates, and scales and biases of every linear layer, and norms.

``lit_model.pth.adapter_v2``: version 1's names (see `zinit.interop.litgpt`), and ``adapter_scale`` and ``adapter_bias``
of every linear layer, the head's included: ``y = adapter_scale * (W x + adapter_bias)``. The query, key and value
projections are one layer there, ``attn.qkv`` since version 0.5.5 with all queries first, ``attn.attn`` before with one
block per group.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from zinit.adapter.handle import Handle
from zinit.adapter.select import select_sites
from zinit.backbones.base import AttentionSite
from zinit.backbones.layers import HEAD, linears_of
from zinit.config import AdapterConfig, TuningConfig
from zinit.errors import CheckpointError
from zinit.files import write_atomically
from zinit.interop import _llama as llama
from zinit.interop._files import adapter_tensors, pickled, read_pickle, tensors_in
from zinit.interop._layers import cannot, sites_of, topmost_layers
from zinit.interop._tuned import TunedLlama
from zinit.interop.base import Format, Gate, Imported, ImportedAdapter
from zinit.interop.litgpt import GATE, PROMPT, fused_rows, prompts_by_layer, warn_of_wrong_rows

LAYERS = {"attn.proj": llama.OUT, "mlp.fc_1": llama.GATE, "mlp.fc_2": llama.UP, "mlp.proj": llama.DOWN}
NORMS = {"norm_1.weight": llama.ATTENTION_NORM, "norm_2.weight": llama.MLP_NORM}
FUSED, FUSED_BEFORE = "attn.qkv", "attn.attn"
KINDS = {"adapter_bias": "bias", "adapter_scale": "scale"}
LAST_NORM = "transformer.ln_f.weight"
_NAME = re.compile(r"transformer\.h\.(\d{1,6})\.(.+)")


def read(path: Path, model: nn.Module, *, length: int, gate: Gate) -> ImportedAdapter:
    """Reads a file of version 0.5.5 or later, its prompts as the keys and values that they had in training.

    ``length`` and ``gate`` are unused: the file and LitGPT fix them.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit the model.
    """
    tensors, sites = _open(path, model, "litgpt-v2", FUSED)
    config, own = prompts_by_layer(tensors, sites, path)
    for site in select_sites(model, sites, config):
        scale, bias = (_fused(tensors, site, sites, kind, path) for kind in ("adapter_scale", "adapter_bias"))
        prompt = own.pop(f"{site.name}.prompt.weight")
        own[f"{site.name}.key"], own[f"{site.name}.value"] = fused_rows(
            site, prompt, lambda blocks, scale=scale, bias=bias: scale * (blocks + bias)
        )
    warn_of_wrong_rows(path, "litgpt-v2-legacy")
    prefix = dataclasses.replace(config, parametrization="key_value"), own
    return _tuned(tensors, model, sites, path, prefix, legacy=False)


def read_legacy(path: Path, model: nn.Module, *, length: int, gate: Gate) -> ImportedAdapter:
    """Reads a file of a version before 0.5.5; see `read`."""
    tensors, sites = _open(path, model, "litgpt-v2-legacy", FUSED_BEFORE)
    return _tuned(tensors, model, sites, path, prompts_by_layer(tensors, sites, path), legacy=True)


def _open(path: Path, model: nn.Module, format: str, fused: str) -> tuple[dict[str, Tensor], list[AttentionSite]]:
    tensors = tensors_in(read_pickle(path), path, unwrap="model")
    tensors = adapter_tensors(tensors, path, format)
    if not any(f".{fused}." in name for name in tensors):
        other = {FUSED: "litgpt-v2-legacy", FUSED_BEFORE: "litgpt-v2"}[fused]
        raise CheckpointError(f"{path} has no {fused!r}: another version wrote it. Import it with format={other!r}.")
    return tensors, sites_of(model)


def _fused(
    tensors: dict[str, Tensor], site: AttentionSite, sites: list[AttentionSite], kind: str, path: Path
) -> Tensor:
    """(H + 2G, 1, D): what acts on the blocks of a layer's fused projection."""
    name = f"transformer.h.{sites.index(site)}.{FUSED}.{kind}"
    if name not in tensors:
        raise CheckpointError(f"{path} has prompts but no {name}, which an adapter_v2 holds for every layer.")
    parts = _split(tensors[name], site, path, legacy=False)
    return torch.cat(parts).float().view(-1, 1, site.head_dim)


def _tuned(
    tensors: dict[str, Tensor],
    model: nn.Module,
    sites: list[AttentionSite],
    path: Path,
    prefix: Imported,
    *,
    legacy: bool,
) -> ImportedAdapter:
    paths = llama.LlamaPaths(model, sites, path)
    head = next(iter(linears_of(model, sites, [HEAD])))
    tuned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        own, _, kind = (found[2] if found else name).rpartition(".")
        if found and found[2] in NORMS:
            tuned[f"{paths.block(int(found[1]), path)}.{NORMS[found[2]]}.weight"] = tensor
        elif found and kind in KINDS and own in (FUSED, FUSED_BEFORE):
            block, site = paths.block(int(found[1]), path), sites[int(found[1])]
            for layer, part in zip(
                (llama.QUERY, llama.KEY, llama.VALUE), _split(tensor, site, path, legacy=legacy), strict=True
            ):
                tuned[f"{block}.{layer}.{KINDS[kind]}"] = part
        elif found and kind in KINDS and own in LAYERS:
            tuned[f"{paths.block(int(found[1]), path)}.{LAYERS[own]}.{KINDS[kind]}"] = tensor
        elif name in (f"lm_head.{kind}" for kind in KINDS):
            tuned[f"{head}.{KINDS[kind]}"] = tensor
        elif name == LAST_NORM:
            tuned[f"{paths.last_norm}.weight"] = tensor
    return llama.tuned_adapter(prefix, TuningConfig(linears=("all", HEAD)), tuned)


def _split(fused: Tensor, site: AttentionSite, path: Path, *, legacy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries', keys' and values' rows of a fused vector: all queries first, or one block per group."""
    heads, groups, width = site.num_heads, site.num_kv_heads, site.head_dim
    if fused.shape != ((heads + 2 * groups) * width,):
        raise CheckpointError(
            f"{path} has a fused projection of {tuple(fused.shape)} rows, but this model's has "
            f"{(heads + 2 * groups) * width}."
        )
    if not legacy:
        query, key, value = fused.split([heads * width, groups * width, groups * width])
        return query, key, value
    blocks = fused.view(groups, heads // groups + 2, width)
    parts = blocks[:, :-2], blocks[:, -2], blocks[:, -1]
    query, key, value = (torch.flatten(part) for part in parts)
    return query, key, value


def write(handle: Handle, path: Path) -> None:
    """Writes a file for version 0.5.5 or later: of an adapter without prompts, whose place closed gates take.

    Raises:
        CheckpointError: if the format cannot express the adapter.
    """
    if AdapterConfig.of(handle.config).parts:
        raise cannot(
            "litgpt-v2",
            "LitGPT 0.5.5 and later reads a prompt's keys and values from the wrong rows of the fused projection, "
            "which are not those of this adapter's prompts ('litgpt-v2-legacy' can hold prompts)",
        )
    _write(handle, path, "litgpt-v2", legacy=False)


def write_legacy(handle: Handle, path: Path) -> None:
    """Writes a file for a version before 0.5.5; see `write`. Gates are written as they act, not squashed."""
    _write(handle, path, "litgpt-v2-legacy", legacy=True)


def _write(handle: Handle, path: Path, format: str, *, legacy: bool) -> None:
    own = TunedLlama(handle, format)
    own.refuse_lora()
    own.refuse_scale("output")
    own.refuse_bare_prompts()
    tensors: dict[str, Tensor] = {}
    layers = [] if own.part is None else topmost_layers(handle, format, own.part)
    prompts = {layer.site.name: (layer.prompt, layer.effective) for layer in layers}
    if own.part is None:
        prompts = {site.name: (torch.zeros(1, site.width), torch.zeros(site.num_heads)) for site in own.sites}
    for index, (block, site) in enumerate(zip(own.blocks, own.sites, strict=True)):
        layer = f"transformer.h.{index}"
        if site.name in prompts:
            tensors[layer + PROMPT], gate = prompts[site.name]
            tensors[layer + GATE] = gate.view(1, 1, -1, 1)
        for theirs, mine in KINDS.items():
            parts = [own.vector(f"{block}.{name}", mine) for name in (llama.QUERY, llama.KEY, llama.VALUE)]
            tensors[f"{layer}.{FUSED_BEFORE if legacy else FUSED}.{theirs}"] = _join(parts, site, legacy=legacy)
            for name, linear in LAYERS.items():
                tensors[f"{layer}.{name}.{theirs}"] = own.vector(f"{block}.{linear}", mine)
        for name, norm in NORMS.items():
            tensors[f"{layer}.{name}"] = own.norm(f"{block}.{norm}")
    head = next(iter(linears_of(handle.model, own.sites, [HEAD])))
    tensors |= {f"lm_head.{theirs}": own.vector(head, mine) for theirs, mine in KINDS.items()}
    tensors[LAST_NORM] = own.norm(own.last_norm)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pickled({"model": {name: tensor.contiguous() for name, tensor in tensors.items()}}))


def _join(parts: list[Tensor], site: AttentionSite, *, legacy: bool) -> Tensor:
    """The other way of `_split`."""
    if not legacy:
        return torch.cat(parts)
    groups = [part.view(site.num_kv_heads, -1, site.head_dim) for part in parts]
    return torch.cat(groups, dim=1).flatten()


LITGPT_V2 = Format("LitGPT 0.5.5 and later, adapter_v2", read, write, needs_weights=True)
LITGPT_V2_LEGACY = Format("LitGPT before 0.5.5, adapter_v2", read_legacy, write_legacy)
