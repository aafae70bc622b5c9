"""Hugging Face PEFT, ``AdaptionPrompt``.

A folder: ``adapter_config.json`` says K (``adapter_len``) and L (``adapter_layers``, counted from the top);
``adapter_model.safetensors`` (older: ``.bin``) holds ``base_model.model.{module}.adaption_prompt`` (1, K, C) and
``.adaption_gate`` (1,) for every adapted attention module. The gate is one number per layer, not squashed.

PEFT passes its branch through the attention's ``o_proj`` on its own and adds the result to the attention's. That is
zinit's sum, unless ``o_proj`` has a bias, which then counts twice even while every gate is closed. In GPT-2 its branch
skips the output projection, which is another function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zinit.adapter.handle import Handle
from zinit.adapter.scopes import prompts_of
from zinit.backbones.base import AttentionSite
from zinit.compat import commit_hash, name_or_path
from zinit.errors import CheckpointError
from zinit.files import is_file, read_json, write_atomically
from zinit.interop._files import adapter_tensors, read_pickle, read_safetensors, tensors_in
from zinit.interop._layers import LayerOfPrompts, cannot, model_type, plain_config, sites_of, to_prefix, topmost_layers
from zinit.interop.base import Format, Gate, Imported

FORMAT = "peft"
CONFIG, TENSORS, LEGACY_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, PROMPT, GATE = "base_model.model.", ".adaption_prompt", ".adaption_gate"
MODEL_TYPES = ("llama", "mistral")
"""The model types that PEFT attaches an AdaptionPrompt to before the output projection."""


def read(path: Path, model: nn.Module, *, length: int, gate: Gate) -> Imported:
    """Reads an AdaptionPrompt of a LLaMA or Mistral. ``length`` and ``gate`` are unused: the folder and PEFT fix them.

    Raises:
        CheckpointError: if files are missing, damaged, of another method, do not fit the model, or mean a function that
            a prefix cannot express.
    """
    config, tensors = _read_config(path / CONFIG), adapter_tensors(_read_tensors(path), path, FORMAT)
    modules = {name.removesuffix(PROMPT): value for name, value in tensors.items() if name.endswith(PROMPT)}
    sites = sites_of(model)
    _check_same_function(modules, sites, path)
    prompts, gates = {}, {}
    for module, prompt in modules.items():
        layer = _layer(module.removeprefix(PREFIX), sites, path)
        if prompt.dim() != 3 or prompt.shape[:2] != (1, config["adapter_len"]):
            raise CheckpointError(
                f"{path / CONFIG} says adapter_len {config['adapter_len']!r}, but {module}{PROMPT} has shape "
                f"{tuple(prompt.shape)}. Expected (1, adapter_len, width)."
            )
        prompts[layer] = prompt[0]
        if module + GATE in tensors:
            gates[layer] = tensors[module + GATE]
    if len(prompts) != config["adapter_layers"]:
        raise CheckpointError(
            f"{path / CONFIG} says adapter_layers {config['adapter_layers']!r}, but there are prompts for "
            f"{len(prompts)} layers."
        )
    return to_prefix(prompts, gates, sites, gate="identity", gate_per="layer", path=path)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if is_file(folder / TENSORS):
        return read_safetensors(folder / TENSORS)
    if is_file(folder / LEGACY_TENSORS):
        return tensors_in(read_pickle(folder / LEGACY_TENSORS), folder / LEGACY_TENSORS)
    raise CheckpointError(f"{folder} holds neither {TENSORS} nor {LEGACY_TENSORS}.")


def _check_same_function(modules: Mapping[str, Tensor], sites: list[AttentionSite], path: Path) -> None:
    """PEFT computes what a gated prefix computes in these modules."""
    if any(module.endswith(".attn") for module in modules):
        raise CheckpointError(
            f"{path} is an AdaptionPrompt of GPT-2, which zinit does not import: PEFT adds its branch after the output "
            f"projection without passing it through, so it is another function than a gated "
            f"prefix{_off_by(modules, sites)}."
        )
    if any(_output_bias(site) for site in sites):
        raise CheckpointError(
            f"{path} cannot be imported onto this model: its output projection has a bias, which PEFT adds a second "
            f"time in every adapted layer. The imported adapter would not be the one that was trained."
        )


@torch.no_grad()
def _off_by(modules: Mapping[str, Tensor], sites: list[AttentionSite]) -> str:
    """By how much passing the projection changes what the prompts' values add, in words; "" where it cannot be told."""
    ratios = []
    for name, prompt in modules.items():
        site = next((site for site in sites if name.endswith(f".{site.name}")), None)
        project = getattr(site.module, "c_proj", None) if site else None
        if site is None or project is None or prompt.is_meta or prompt.shape[-1] != site.width:
            return ""
        weight = next(project.parameters())
        if weight.is_meta:
            return ""
        with prompts_of(""):  # the base's
            _, value = site.project_kv(site.module, prompt.to(weight).view(-1, site.width))
            added = value[0].transpose(0, 1).flatten(1)
            passed = project(added) - project(torch.zeros_like(added))
        ratios.append(float((passed - added).norm() / added.norm()))
    return f" (here what the prompts add would be off by up to {max(ratios):.0%} of its size)" if ratios else ""


def write(handle: Handle, path: Path) -> None:
    """Writes a folder for ``peft.PeftModel.from_pretrained``. An adapter without gating is written as gates of 1.

    Args:
        handle: the adapter; its gates must be equal over the heads of each layer.
        path: the folder.

    Raises:
        CheckpointError: if the format cannot express the adapter.
    """
    from safetensors.torch import save

    layers = topmost_layers(handle, FORMAT)
    _check_base(handle, FORMAT)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if not (layer.effective == layer.effective[0]).all():
            raise cannot(
                FORMAT,
                f"it has one gate per layer, and those of {layer.site.name} differ from head to head (from "
                f"{layer.effective.min():.4g} to {layer.effective.max():.4g}). Train with gate_per='layer' for PEFT",
            )
        tensors[f"{PREFIX}{layer.site.name}{PROMPT}"] = layer.prompt[None].contiguous()
        tensors[f"{PREFIX}{layer.site.name}{GATE}"] = layer.effective[:1].clone()
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / TENSORS, save(tensors, metadata={"format": "pt"}))
    write_atomically(path / CONFIG, json.dumps(_config(handle, layers), indent=2).encode() + b"\n")


def _config(handle: Handle, layers: list[LayerOfPrompts]) -> dict[str, Any]:
    """PEFT's ``AdaptionPromptConfig``."""
    base: Any = getattr(handle.model, "config", None)
    return {
        "adapter_layers": len(layers),
        "adapter_len": plain_config(handle, FORMAT).length,
        "auto_mapping": None,
        "base_model_name_or_path": name_or_path(base),
        "inference_mode": True,
        "peft_type": "ADAPTION_PROMPT",
        "revision": commit_hash(base),
        "target_modules": layers[0].site.name.rpartition(".")[2],
        "task_type": "CAUSAL_LM" if callable(getattr(handle.model, "generate", None)) else None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise CheckpointError(f"{path.parent} holds no {CONFIG}. Expected a folder that PEFT saved.")
    config = read_json(path, CheckpointError, "Expected a file that PEFT saved.")
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method != "ADAPTION_PROMPT":
        raise CheckpointError(f"{path.parent} is a PEFT adapter of type {method}. Expected ADAPTION_PROMPT.")
    for name in ("adapter_len", "adapter_layers"):
        if not isinstance(config.get(name), int):
            raise CheckpointError(f"{path} has {name} {config.get(name)!r}. Expected a whole number.")
    return config


def _layer(module: str, sites: list[AttentionSite], path: Path) -> int:
    """Index of the site that a file calls ``module``; the part before "layers" depends on the class PEFT wrapped."""
    found = [
        index
        for index, site in enumerate(sites)
        if site.name == module or site.name.endswith("." + module) or module.endswith("." + site.name)
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} has prompts for {module!r}, but this model's layers are named {sites[-1].name!r}."
        )
    return found[0]


def _output_bias(site: AttentionSite) -> bool:
    return getattr(getattr(site.module, "o_proj", None), "bias", None) is not None


def _check_base(handle: Handle, format: str) -> None:
    """PEFT can attach to the model, and computes the same on it."""
    if model_type(handle) not in MODEL_TYPES:
        known = " and ".join(MODEL_TYPES)
        raise cannot(
            format, f"PEFT attaches it to {known} models only, and this adapter's model is {model_type(handle)!r}"
        )
    for site in handle.sites:
        if _output_bias(site):
            raise cannot(format, "PEFT adds the bias of this model's output projection twice in every adapted layer")
        if site.num_heads * site.head_dim != site.width:
            raise cannot(
                format,
                f"PEFT works only where heads times their width is the model's: here {site.num_heads} x "
                f"{site.head_dim} is not {site.width}",
            )


PEFT = Format("Hugging Face PEFT, AdaptionPrompt", read, write)
