"""OpenGVLab/LLaMA-Adapter, V2: the chat model (65B), and the one that takes images (7B).

Chat: biases, scales on the input and norms of all layers, with or without prompts.
``{"model": {...}}``: ``layers.{i}.attention.wq_bias``, ``wq_scale`` and so on beside Meta's linear layers, and
``attention_norm.weight``, ``ffn_norm.weight``, which replace the host's. Rows of the query's and key's biases are in
Meta's order. Prompts, if there are any, pass the scaled and biased projections. The released file has none.

With images: ``{"model": {...}, "config": {...}}``: CLIP's tokens pass a bridge of ViT blocks, whose K queries are added
to the prompts of all adapted layers (``visual_*``, ``clip_proj*``, ``adapter_query``). Biases (not of keys and values),
norms and LoRA of the language model are named ``llama.layers.{i}.attention.wq.bias``, ``lora_wq_l1`` and so on. A file
with LoRA has a factor ``new_gate`` beside each layer's gates: the gate is tanh(gate) * new_gate. Images were read with
OpenCV, channels in reverse.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.handle import Handle
from zinit.adapter.visual import VisualTokens
from zinit.backbones.base import AttentionSite
from zinit.config import AdapterConfig, PrefixConfig, TuningConfig
from zinit.errors import CheckpointError
from zinit.files import write_atomically
from zinit.interop import _llama as llama
from zinit.interop._bridge import QUERIES, read_bridge, write_bridge
from zinit.interop._files import adapter_tensors, pickled, read_pickle, tensors_in
from zinit.interop._layers import cannot, sites_of, topmost_layers
from zinit.interop._tuned import TunedLlama
from zinit.interop.base import Format, Gate, ImportedAdapter
from zinit.interop.official import TABLE, check_base, prompts_by_layer, write_prompts

LAYERS = {
    "attention.wq": llama.QUERY, "attention.wk": llama.KEY, "attention.wv": llama.VALUE, "attention.wo": llama.OUT,
    "feed_forward.w1": llama.GATE, "feed_forward.w2": llama.DOWN, "feed_forward.w3": llama.UP,
}  # fmt: skip
NORMS = {"attention_norm.weight": llama.ATTENTION_NORM, "ffn_norm.weight": llama.MLP_NORM}
_TUNED = re.compile(r"layers\.(\d{1,6})\.(\w+\.w[qkvo123])_(bias|scale)")
_NORM = re.compile(r"layers\.(\d{1,6})\.(attention_norm\.weight|ffn_norm\.weight)")
LAST_NORM = "norm.weight"
TUNED_LINEARS = tuple(name.rpartition(".")[2] for name in (llama.QUERY, llama.OUT, llama.GATE, llama.UP, llama.DOWN))


def read_chat(path: Path, model: nn.Module, *, length: int, gate: Gate) -> ImportedAdapter:
    """Reads a V2 chat adapter. ``gate`` is unused: these files' gates are squashed by tanh.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit ``length`` or the model.
    """
    tensors = tensors_in(read_pickle(path, allow=(argparse.Namespace,)), path, unwrap="model")
    tensors = adapter_tensors(tensors, path, "official-v2-chat")
    sites = sites_of(model)
    paths = llama.LlamaPaths(model, sites, path)
    tuned: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _TUNED.fullmatch(name):
            layer = LAYERS.get(found[2])
            if layer is None:
                raise CheckpointError(f"{path} tunes {found[2]!r}, which is no linear layer of a LLaMA.")
            if layer in (llama.QUERY, llama.KEY) and found[3] == "bias":
                tensor = llama.half_split(tensor, sites[0].head_dim)
            tuned[f"{paths.block(int(found[1]), path)}.{layer}.{found[3]}"] = tensor
        elif found := _NORM.fullmatch(name):
            tuned[f"{paths.block(int(found[1]), path)}.{NORMS[found[2]]}.weight"] = tensor
    if LAST_NORM in tensors:
        tuned[f"{paths.last_norm}.weight"] = tensors[LAST_NORM]
    config = TuningConfig(
        bias=any(name.endswith("_bias") for name in tensors),
        scale="input" if any(name.endswith("_scale") for name in tensors) else "none",
        norms=True if LAST_NORM in tensors else "blocks",
    )
    prefix = prompts_by_layer(tensors, sites, path, length=length, gate="tanh") if TABLE in tensors else None
    return llama.tuned_adapter(prefix, config, tuned)


_BIAS = re.compile(r"layers\.(\d{1,6})\.(\w+\.w[qkvo123])\.(bias)")
_LORA = re.compile(r"layers\.(\d{1,6})\.(attention|feed_forward)\.lora_(w[qkvo123])_l([12])\.weight")


def read_multimodal(path: Path, model: nn.Module, *, length: int, gate: Gate, heads: int = 16) -> ImportedAdapter:
    """Reads a V2 adapter that takes images. ``gate`` is unused: these files' gates are squashed by tanh.

    Args:
        path: the file.
        model: the LLaMA it was made for.
        length: K; the file says it.
        gate: unused.
        heads: of its visual blocks. The released ones have 16.

    Raises:
        CheckpointError: if the file is damaged, of another kind, or does not fit the model.
    """
    stored = tensors_in(read_pickle(path, allow=(argparse.Namespace,)), path, unwrap="model")
    stored = adapter_tensors(stored, path, "official-v2")
    tensors = {re.sub(r"^ll[am]+a\.", "", name): tensor for name, tensor in stored.items()}
    missing = [name for name in (TABLE, LAST_NORM) if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}, which a V2 adapter with images holds.")
    sites = sites_of(model)
    paths = llama.LlamaPaths(model, sites, path)
    options, bridge = read_bridge(tensors, heads, path)
    prefix, own = prompts_by_layer(tensors, sites, path, length=len(tensors[QUERIES]), gate="tanh")
    prefix = _with_factors(dataclasses.replace(prefix, prompt="table+context"), own, tensors, sites)
    tuned, config = released_tuning(tensors, paths, sites, path)
    adapter, named = llama.tuned_adapter((prefix, own), config, tuned)
    adapter = dataclasses.replace(adapter, context="visual-tokens", context_options=options)
    return adapter, named | bridge


def _with_factors(
    config: PrefixConfig, own: dict[str, Tensor], tensors: dict[str, Tensor], sites: list[AttentionSite]
) -> PrefixConfig:
    """A gate and its factor become one number, taken as it is: no tanh may give their product."""
    factors = {index: tensors.get(f"layers.{index}.attention.new_gate") for index in range(len(sites))}
    if all(factor is None for factor in factors.values()):
        return config
    for index, site in enumerate(sites):
        if (name := f"{site.name}.gate") in own:
            factor = factors[index]
            own[name] = own[name].tanh() * (1.0 if factor is None else factor.float().view(()))
    return dataclasses.replace(config, gate="identity")


def released_tuning(
    tensors: dict[str, Tensor], paths: llama.LlamaPaths, sites: list[AttentionSite], path: Path
) -> tuple[dict[str, Tensor], TuningConfig]:
    """Biases of all linear layers but keys' and values', norms, and LoRA where there is any.

    Raises:
        CheckpointError: if a tensor is of no linear layer of a LLaMA.
    """
    tuned = {f"{paths.last_norm}.weight": tensors[LAST_NORM]} if LAST_NORM in tensors else {}
    rank = 0
    for name, tensor in tensors.items():
        if found := _NORM.fullmatch(name):
            tuned[f"{paths.block(int(found[1]), path)}.{NORMS[found[2]]}.weight"] = tensor
        elif found := (_BIAS.fullmatch(name) or _LORA.fullmatch(name)):
            linear = LAYERS.get(found[2] if found[3] == "bias" else f"{found[2]}.{found[3]}")
            if linear is None:
                raise CheckpointError(f"{path} tunes {name!r}, which is of no linear layer of a LLaMA.")
            of_output = found[3] == "bias" or found[4] == "2"
            if linear in (llama.QUERY, llama.KEY) and of_output:
                tensor = llama.half_split(tensor, sites[0].head_dim)
            kind = "bias" if found[3] == "bias" else ("lora_down", "lora_up")[int(found[4]) - 1]
            rank = tensor.shape[0] if kind == "lora_down" else rank
            tuned[f"{paths.block(int(found[1]), path)}.{linear}.{kind}"] = tensor
    return tuned, TuningConfig(
        linears=TUNED_LINEARS,
        scale="none",
        lora_rank=rank,
        lora_linears=("all",) if rank else None,
    )


def write_chat(handle: Handle, path: Path) -> None:
    """Writes a V2 chat adapter, with prompts if it has any. What is not learned is written as what changes nothing.

    Raises:
        CheckpointError: if the format cannot express the adapter.
    """
    own = TunedLlama(handle, "official-v2-chat")
    own.refuse_lora()
    own.refuse_scale("input")
    own.refuse_head()
    own.refuse_bare_prompts()
    check_base(handle, own.format, own.sites)
    if own.part is not None and own.part.config.prompt != "table":
        raise cannot(own.format, "it takes images, and the format does not")
    tensors = {} if own.part is None else write_prompts(topmost_layers(handle, own.format, own.part), own.sites)
    for index, block in enumerate(own.blocks):
        for name, linear in LAYERS.items():
            if own.config.bias or own.config.scale == "none":
                tensors[f"layers.{index}.{name}_bias"] = _metas(own.vector(f"{block}.{linear}", "bias"), linear, own)
            if own.config.scale != "none":
                tensors[f"layers.{index}.{name}_scale"] = own.vector(f"{block}.{linear}", "scale")
        for name, norm in NORMS.items():
            tensors[f"layers.{index}.{name}"] = own.norm(f"{block}.{norm}")
    if own.config.norms is True:
        tensors[LAST_NORM] = own.norm(own.last_norm)
    _write(path, {"model": tensors})


def write_multimodal(handle: Handle, path: Path) -> None:
    """Writes a V2 adapter that takes images. What is not learned is written as what changes nothing.

    Raises:
        CheckpointError: if the format cannot express the adapter.
    """
    own = TunedLlama(handle, "official-v2")
    own.refuse_scale()
    own.refuse_head()
    check_base(handle, own.format, own.sites)
    bridge = _bridge_of(handle, own)
    assert own.part is not None
    layers = topmost_layers(handle, own.format, own.part, prompt="table+context")
    tensors = write_prompts(layers, own.sites, factors=bool(own.config.lora_rank))
    for index, block in enumerate(own.blocks):
        for name, linear in LAYERS.items():
            room, _, kind = name.partition(".")
            bias = own.vector(f"{block}.{linear}", "bias")
            if linear not in (llama.KEY, llama.VALUE):
                tensors[f"layers.{index}.{name}.bias"] = _metas(bias, linear, own)
            elif bias.count_nonzero():
                raise cannot(own.format, f"it learns a bias of {linear}, and the format has none of keys and values")
            if own.config.lora_rank:
                where = f"layers.{index}.{room}.lora_{kind}"
                tensors[f"{where}_l1.weight"] = own.vector(f"{block}.{linear}", "lora_down")
                tensors[f"{where}_l2.weight"] = _metas(own.vector(f"{block}.{linear}", "lora_up"), linear, own)
        for name, norm in NORMS.items():
            tensors[f"layers.{index}.{name}"] = own.norm(f"{block}.{norm}")
    tensors[LAST_NORM] = own.norm(own.last_norm)
    language = {name if name == TABLE else f"llama.{name}": tensor for name, tensor in tensors.items()}
    rank = own.config.lora_rank
    config = {"w_bias": True, "w_lora": bool(rank), "lora_rank": rank or 16}
    _write(path, {"model": language | bridge, "config": config})


def _bridge_of(handle: Handle, own: TunedLlama) -> dict[str, Tensor]:
    source = handle.shared.get("context")
    if own.part is None or own.part.config.prompt != "table+context" or not isinstance(source, VisualTokens):
        raise cannot(own.format, "the format adds the tokens of 'visual-tokens' to prompts, prompt='table+context'")
    options = AdapterConfig.of(handle.config).context_options
    if options.get("mlp_ratio", 4.0) != 4.0:
        raise cannot(own.format, f"its blocks have mlp_ratio={options['mlp_ratio']}, and the format's have 4")
    if handle.encoder_identity is not None and not handle.encoder_identity.get("bgr"):
        raise cannot(
            own.format,
            "its encoder takes images as they are, and the code that reads the format gives them with their channels "
            "in reverse (bgr)",
        )
    return write_bridge({name: p.detach().to("cpu", torch.float32) for name, p in source.named_parameters()})


def _metas(x: Tensor, linear: str, own: TunedLlama) -> Tensor:
    """What acts on a layer's output, in Meta's order of rows."""
    return llama.interleaved(x, own.sites[0].head_dim) if linear in (llama.QUERY, llama.KEY) else x


def _write(path: Path, content: dict[str, Any]) -> None:
    content["model"] = {name: tensor.contiguous() for name, tensor in content["model"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, pickled(content))


MULTIMODAL = Format("OpenGVLab/LLaMA-Adapter, V2 with images", read_multimodal, write_multimodal, bgr=True)
CHAT = Format("OpenGVLab/LLaMA-Adapter, V2 chat", read_chat, write_chat)
