"""OpenGVLab/LLaMA-Adapter, V1 text adapters.

One dictionary written by ``torch.save``: a table of all prompts, ``adapter_query.weight`` (L x K, C), the lowest
adapted layer first, and ``layers.{i}.attention.gate`` for every layer i of the model. Only the topmost L gates are
used. The file holds neither K nor L, only their product. A full training checkpoint holds the same names, among
LLaMA's own, under ``model``, next to the trainer's arguments.

A file of the caption demo holds a second table, ``cap_adapter_query.weight``, gates ``cap_gate`` and a bridge of ViT
blocks, whose K visual tokens are added to all prompts of that table. What is known of it comes from a mirror of the
demo.

A gate is (1, H, 1, 1), one number per head, which the project's trainer squashes with tanh and its released inference
script does not (issue 39 there); or (1,), from the first release, which had no tanh.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zinit.adapter.handle import Handle
from zinit.backbones.base import AttentionSite
from zinit.config import ONLY, AdapterConfig
from zinit.errors import CheckpointError, ConfigError
from zinit.files import write_atomically
from zinit.interop._bridge import QUERIES, read_bridge
from zinit.interop._files import adapter_tensors, pickled, read_pickle, tensors_in
from zinit.interop._layers import LayerOfPrompts, cannot, model_type, sites_of, to_prefix, topmost_layers
from zinit.interop.base import Format, Gate, Imported, ImportedAdapter

FORMAT = "official-v1"
TABLE, GATE = "adapter_query.weight", "layers.{}.attention.gate"
FACTOR = "layers.{}.attention.new_gate"
CAPTION_TABLE = "cap_adapter_query.weight"


def read(
    path: Path,
    model: nn.Module,
    *,
    length: int,
    gate: Gate,
    branch: Literal["caption", "text"] | None = None,
    heads: int = 16,
) -> ImportedAdapter:
    """Reads a V1 adapter, or the adapter in a full training checkpoint.

    Args:
        path: the file.
        model: a LLaMA in transformers' layout (prompts and gates are the same in both layouts).
        length: K.
        gate: "tanh" for the model that was trained, "identity" for what the released inference script computes. A
            file with one gate per layer is always read as "identity": no trainer for it was ever published.
        branch: of a file of the caption demo: "caption", which takes images, or "text". Default: caption if there is
            one.
        heads: of the caption branch's visual blocks. The demo's have 16.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit ``length`` or the model.
        ConfigError: if there is no such branch.
    """
    if branch not in (None, "caption", "text"):
        raise ConfigError(f"branch must be 'caption' or 'text'; got {branch!r}.")
    tensors = tensors_in(read_pickle(path, allow=(argparse.Namespace,)), path, unwrap="model")
    tensors, sites = adapter_tensors(tensors, path, FORMAT), sites_of(model)
    chosen = branch or ("caption" if CAPTION_TABLE in tensors else "text")
    if (wanted := CAPTION_TABLE if chosen == "caption" else TABLE) not in tensors:
        raise CheckpointError(f"{path} has no {wanted}, so no {chosen} branch. Leave branch out.")
    if branch is None and {TABLE, CAPTION_TABLE} <= tensors.keys():
        warnings.warn(
            f"{path} holds two adapters, one for captions and one for text. The one for captions was imported; for the "
            f"other pass branch='text'.",
            UserWarning,
            stacklevel=3,
        )
    if chosen == "text":
        return prompts_by_layer(tensors, sites, path, length=length, gate=gate)
    options, bridge = read_bridge(tensors, heads, path)
    own = {TABLE: tensors[CAPTION_TABLE]} | {
        name.replace("cap_gate", "gate"): tensor for name, tensor in tensors.items() if name.endswith(".cap_gate")
    }
    config, named = prompts_by_layer(own, sites, path, length=len(tensors[QUERIES]), gate=gate)
    part = dataclasses.replace(config, prompt="table+context")
    return AdapterConfig(parts={ONLY: part}, context="visual-tokens", context_options=options), named | bridge


def prompts_by_layer(
    tensors: dict[str, Tensor], sites: list[AttentionSite], path: Path, *, length: int, gate: Gate
) -> Imported:
    """The table of all prompts and the gates of the topmost layers, as the V1 and V2 files of the project hold them.

    Raises:
        CheckpointError: if they do not fit ``length`` or the model.
    """
    table = tensors[TABLE]
    _check_table(table, length, sites, path)
    gates = {int(found[1]): value for name, value in tensors.items() if (found := _GATE.fullmatch(name))}
    first = len(sites) - table.shape[0] // length
    if gates and max(gates) + 1 != len(sites):
        raise CheckpointError(f"{path} has gates for {max(gates) + 1} layers, but this model has {len(sites)}.")
    unused = [layer for layer, value in gates.items() if layer < first and value.count_nonzero()]
    if unused:
        raise CheckpointError(
            f"with length={length}, {path} adapts layers {first} to {len(sites) - 1}, but layer {min(unused)} has a "
            f"trained gate as well. Pass a smaller length (its table has {table.shape[0]} rows)."
        )
    scalar = any(value.numel() == 1 and (value.dim() == 1 or sites[0].num_heads > 1) for value in gates.values())
    prompts = {first + index: prompt for index, prompt in enumerate(table.split(length))}
    if scalar:
        return to_prefix(prompts, gates, sites, gate="identity", gate_per="layer", path=path)
    return to_prefix(prompts, gates, sites, gate=gate, gate_per="head", path=path)


def _check_table(table: Tensor, length: int, sites: list[AttentionSite], path: Path) -> None:
    """The table of prompts splits over the model's layers, and the model is of the kind that took such tables."""
    if table.dim() != 2 or table.shape[0] % length or not 0 < table.shape[0] // length <= len(sites):
        raise CheckpointError(
            f"{path} has a prompt table of shape {tuple(table.shape)}, which is not {length} prompts for each of at "
            f"most {len(sites)} layers. Pass length=K; the file's name may tell it ('len10' is 10)."
        )
    if any(site.num_kv_heads != site.num_heads for site in sites):
        raise CheckpointError(
            f"this model shares {sites[-1].num_kv_heads} key/value heads among {sites[-1].num_heads} query heads; "
            f"the project's adapters are made for the first LLaMA, which shares none. {path} belongs to another model."
        )


def write(handle: Handle, path: Path, *, reader: Literal["training", "inference"] = "training") -> None:
    """Writes a V1 adapter of the topmost layers. Gates of the other layers, which nothing reads, are left out.

    Args:
        handle: the adapter.
        path: the file.
        reader: what the file is for. "training": the project's trainer (and `zinit.import_adapter` by default), which
            squashes the stored gate with tanh. "inference": the released inference script, which takes it as it is.
            An adapter without gating is written as gates of 1.

    Raises:
        CheckpointError: if the format cannot express the adapter.
        ConfigError: if there is no such reader.
    """
    if reader not in ("training", "inference"):
        raise ConfigError(f"reader must be 'training' or 'inference'; got {reader!r}.")
    layers = topmost_layers(handle, FORMAT)
    check_base(handle, FORMAT)
    tensors: dict[str, Tensor] = {TABLE: torch.cat([layer.prompt for layer in layers])}
    for index, layer in enumerate(layers, start=len(handle.state.sites) - len(layers)):
        if reader == "inference":
            gate = layer.effective
        else:
            gate = layer.gate if layer.squashed else _before_tanh(layer.effective, index)
        tensors[GATE.format(index)] = gate.view(1, -1, 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pickled(tensors))


def _before_tanh(effective: Tensor, index: int) -> Tensor:
    """The numbers whose tanh are the gates of layer ``index``."""
    if not effective.abs().max() < 1:
        raise cannot(
            f"{FORMAT} for the trainer",
            f"its reader takes the tanh of what is stored, and no tanh gives the gate "
            f"{effective[effective.abs().argmax()]:.4g} of layer {index} (reader='inference' can)",
        )
    return effective.double().atanh().float()


def write_prompts(
    layers: list[LayerOfPrompts], sites: list[AttentionSite], *, factors: bool = False
) -> dict[str, Tensor]:
    """The table and the gates of V2's files, whose readers take the tanh of what is stored.

    Args:
        layers: of the prompts.
        sites: all of the model.
        factors: whether each layer has a factor beside its gates, ``new_gate``.
    """
    tensors = {TABLE: torch.cat([layer.prompt for layer in layers])}
    for index, layer in enumerate(layers, start=len(sites) - len(layers)):
        if factors:
            gate, factor = _with_factor(layer.effective)
            tensors[FACTOR.format(index)] = torch.full((1, 1, 1, 1), factor)
        else:
            gate = layer.gate if layer.squashed else _before_tanh(layer.effective, index)
        tensors[GATE.format(index)] = gate.view(1, -1, 1, 1)
    return tensors


def _with_factor(effective: Tensor) -> tuple[Tensor, float]:
    """Gates and a power of two whose product with their tanh is the effective gates, to the bit if any power does."""
    found: tuple[Tensor, float] | None = None
    for power in range(128):
        factor = 2.0**power
        wanted = effective / factor
        if wanted.abs().max() >= 0.9:
            continue
        gate = wanted.double().atanh().float()
        found = found or (gate, factor)
        if torch.equal(gate.tanh() * factor, effective):
            return gate, factor
        if factor > 64 * found[1]:
            break
    assert found is not None
    return found


def check_base(handle: Handle, format: str, sites: list[AttentionSite] | None = None) -> None:
    """The project's code only runs the first LLaMA: no shared key/value heads, no biases.

    Args:
        handle: the adapter.
        format: for messages.
        sites: that are looked at; by default those with a prefix.

    Raises:
        CheckpointError: if the adapter's model is another one.
    """
    if model_type(handle) != "llama":
        raise cannot(
            format, f"the code that reads it runs LLaMA only, and this adapter's model is {model_type(handle)!r}"
        )
    for site in handle.sites if sites is None else sites:
        if site.num_kv_heads != site.num_heads or site.num_heads * site.head_dim != site.width:
            raise cannot(
                format,
                f"the code that reads it runs the first LLaMA, whose heads each have keys and values of their own and "
                f"together the model's width; this model has {site.num_heads} heads of {site.head_dim}, "
                f"{site.num_kv_heads} of them with keys and values, and width {site.width}",
            )
        if any(name.endswith("bias") for name, _ in site.module.named_parameters()):
            raise cannot(format, "the code that reads it knows no biases, and this model's attention has them")


_GATE = re.compile(re.escape(GATE).replace(r"\{\}", r"(\d{1,6})"))

OFFICIAL_V1 = Format("OpenGVLab/LLaMA-Adapter, V1", read, write)
