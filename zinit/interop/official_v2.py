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

from torch import Tensor, nn

from zinit.backbones.base import AttentionSite
from zinit.config import PrefixConfig, TuningConfig
from zinit.errors import CheckpointError
from zinit.interop import _llama as llama
from zinit.interop._files import adapter_tensors, read_pickle, tensors_in
from zinit.interop._layers import sites_of
from zinit.interop.base import Format, Gate, ImportedAdapter
from zinit.interop.official import TABLE, prompts_by_layer

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


BRIDGE = {
    "clip_proj": "proj_in", "clip_proj_norm": "norm_in", "visual_proj": "proj_out", "visual_proj_norm": "norm_out",
}  # fmt: skip
BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
}  # fmt: skip
_BLOCK = re.compile(r"visual_blocks\.(\d{1,6})\.(.+)\.(weight|bias)")
_BIAS = re.compile(r"layers\.(\d{1,6})\.(\w+\.w[qkvo123])\.(bias)")
_LORA = re.compile(r"layers\.(\d{1,6})\.(attention|feed_forward)\.lora_(w[qkvo123])_l([12])\.weight")
QUERIES = "visual_query.weight"


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
    missing = [name for name in (TABLE, QUERIES, "clip_proj.weight", LAST_NORM) if name not in tensors]
    if missing:
        raise CheckpointError(f"{path} has no {', '.join(missing)}, which a V2 adapter with images holds.")
    sites = sites_of(model)
    paths, queries = llama.LlamaPaths(model, sites, path), tensors[QUERIES]
    if queries.dim() != 2:
        raise CheckpointError(f"{path} has visual queries of shape {tuple(queries.shape)}. Expected (K, width).")
    prefix, own = prompts_by_layer(tensors, sites, path, length=queries.shape[0], gate="tanh")
    prefix = _with_factors(dataclasses.replace(prefix, prompt="table+context"), own, tensors, sites)
    bridge = _bridge(tensors)
    tuned, config = released_tuning(tensors, paths, sites, path)
    adapter, named = llama.tuned_adapter((prefix, own), config, tuned)
    blocks = {int(found[1]) for name in tensors if (found := _BLOCK.fullmatch(name))}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"{path} has the visual blocks {sorted(blocks)}. Expected all from 0 on.")
    options = {
        "feature_width": tensors["clip_proj.weight"].shape[1], "hidden": queries.shape[1], "blocks": len(blocks),
        "heads": heads,
    }  # fmt: skip
    adapter = dataclasses.replace(adapter, context="visual-tokens", context_options=options)
    return adapter, named | {f"shared.context.{name}": tensor.float() for name, tensor in bridge.items()}


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


def _bridge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `zinit.adapter.visual.VisualTokens`."""
    made = {"query": tensors[QUERIES]}
    for name, tensor in tensors.items():
        own, _, kind = name.rpartition(".")
        if own in BRIDGE:
            made[f"{BRIDGE[own]}.{kind}"] = tensor
        elif (found := _BLOCK.fullmatch(name)) and found[2] == "attn.qkv":
            made[f"blocks.{found[1]}.self_attn.in_proj_{kind}"] = tensor
        elif found and found[2] in BLOCK:
            made[f"blocks.{found[1]}.{BLOCK[found[2]]}.{kind}"] = tensor
    return made


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


MULTIMODAL = Format("OpenGVLab/LLaMA-Adapter, V2 with images", read_multimodal, bgr=True)
CHAT = Format("OpenGVLab/LLaMA-Adapter, V2 chat", read_chat)
