"""Gradients of an imported adapter as its own file would name and lay them out."""

from __future__ import annotations

import torch

import zinit
from tests.golden.cases import adapter_path


def fused_blocks(module: torch.nn.Module) -> torch.Tensor:
    """LitGPT's fused projection by blocks of D rows, (H + 2G, D, C): all queries, all keys, all values."""
    weight = torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight])
    return weight.unflatten(0, (-1, module.head_dim))


def gradients_in_file_layout(case: str, handle: zinit.Handle) -> dict[str, torch.Tensor]:
    """Gradients of the imported parameters, under the names and in the shapes of the adapter's own file."""
    own = {name: parameter.grad for name, parameter in handle.named_parameters()}
    prompts = {site.name: own.get(f"{site.name}.prompt.weight") for site in handle.sites}
    found = {}
    for index, site in enumerate(handle.sites, start=4 - len(handle.sites)):
        gate = own[f"{site.name}.gate"]
        if case == "imagebind-llm":
            found[f"llama.layers.{index}.attention.gate"] = gate.view(1, -1, 1, 1)
        elif case.startswith("official-v2-multimodal"):
            found |= gate_gradients(case, index, gate)
        elif case.startswith("official"):
            found[f"layers.{index}.attention.gate"] = gate.view(1, -1, 1, 1)
        elif case.startswith("peft"):
            found[f"base_model.model.{site.name}.adaption_gate"] = gate
            found[f"base_model.model.{site.name}.adaption_prompt"] = prompts[site.name][None]
        else:
            found[f"transformer.h.{index}.attn.gating_factor"] = gate.view(1, 1, -1, 1)
            prompt = prompts[site.name]
            if prompt is None:  # through the rows that LitGPT used: key of group g is block g(H/G + 2) + H/G
                blocks, per_group = fused_blocks(site.module), site.num_heads // site.num_kv_heads
                prompt = torch.zeros(own[f"{site.name}.key"].shape[1], site.width)
                scale = fused_vector(handle, site, "scale")
                for group in range(site.num_kv_heads):
                    row = group * (per_group + 2) + per_group
                    prompt += (own[f"{site.name}.key"][group] * scale[row]) @ blocks[row]
                    prompt += (own[f"{site.name}.value"][group] * scale[row + 1]) @ blocks[row + 1]
            found[f"transformer.h.{index}.attn.adapter_wte.weight"] = prompt
    if case.startswith("official") and prompts:
        found["adapter_query.weight"] = torch.cat(list(prompts.values()))
    if case == "imagebind-llm":
        found["prefix_query.weight"] = torch.cat(list(prompts.values()))
    tuned = tuned_gradients(case, handle, own)
    if with_images(case):
        made = bind_gradients(own) if case == "imagebind-llm" else bridge_gradients(own)
        tuned = {f"llama.{name}": gradient for name, gradient in tuned.items()} | made
    return found | tuned


def gate_gradients(case: str, index: int, effective: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a gate and, in files with LoRA, of its factor, by that of their product."""
    stored = torch.load(adapter_path(case), weights_only=True)["model"]
    name = f"llama.layers.{index}.attention."
    factor, squashed = stored.get(f"{name}new_gate"), stored[f"{name}gate"].flatten().tanh()
    if factor is None:
        return {f"{name}gate": effective.view(1, -1, 1, 1)}
    through_tanh = effective * factor.flatten() * (1 - squashed**2)
    return {
        f"{name}gate": through_tanh.view(1, -1, 1, 1),
        f"{name}new_gate": (effective * squashed).sum().view(1, 1, 1, 1),
    }


BRIDGE = {"proj_in": "clip_proj", "norm_in": "clip_proj_norm", "proj_out": "visual_proj",
          "norm_out": "visual_proj_norm"}  # fmt: skip
BLOCK = {"norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1",
         "linear2": "mlp.fc2"}  # fmt: skip


BIND = {"gate": "f1", "down": "f2", "up": "f3"}


def with_images(case: str) -> bool:
    """Whether its names begin with the language model's or the bridge's."""
    return "multimodal" in case or case == "imagebind-llm"


def bridge_gradients(own: dict) -> dict[str, torch.Tensor]:
    """Of the module that makes visual tokens."""
    found = {}
    for name, gradient in own.items():
        path, _, kind = name.removeprefix("shared.context.").rpartition(".")
        if name == "shared.context.query":
            found["visual_query.weight"] = gradient
        elif name.startswith("shared.context.blocks."):
            _, number, inside = path.split(".", 2)
            if kind.startswith("in_proj_"):
                inside, kind = "attn.qkv", kind.removeprefix("in_proj_")
            found[f"visual_blocks.{number}.{BLOCK.get(inside, inside)}.{kind}"] = gradient
        elif name.startswith("shared.context."):
            found[f"{BRIDGE[path]}.{kind}"] = gradient
    return found


def bind_gradients(own: dict) -> dict[str, torch.Tensor]:
    """Of the bind network."""
    found = {}
    for name, gradient in own.items():
        if name.startswith("shared.context."):
            *block, layer, kind = name.removeprefix("shared.context.").split(".")
            number = f"_{int(block[1]) + 1}" if block else ""
            found[f"image_bind_{BIND.get(layer, layer)}{number}.{kind}"] = gradient
    return found


def fused_vector(handle: zinit.Handle, site: zinit.AttentionSite, kind: str, gradient: bool = False) -> torch.Tensor:
    """(H + 2G, D), a scale or bias of LitGPT's fused projection; neutral where there is none."""
    tensors = dict(handle.named_parameters())
    found = [tensors.get(f"tuning.{site.name}.{part}_proj.{kind}") for part in "qkv"]
    if any(vector is None for vector in found):
        return torch.ones(site.num_heads + 2 * site.num_kv_heads, site.head_dim)
    return torch.cat([vector.grad if gradient else vector for vector in found]).detach().view(-1, site.head_dim)


OFFICIAL = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
            "up_proj": "w3"}  # fmt: skip
LITGPT = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
          "mlp.down_proj": "mlp.proj"}  # fmt: skip
NORMS = {"input_layernorm": ("attention_norm", "norm_1"), "post_attention_layernorm": ("ffn_norm", "norm_2")}


def tuned_gradients(case: str, handle: zinit.Handle, own: dict) -> dict[str, torch.Tensor]:
    """As `gradients_in_file_layout`, of scales, biases and norms."""
    found, official = {}, case.startswith("official") or with_images(case)
    for name, gradient in own.items():
        if not name.startswith("tuning."):
            continue
        module, _, kind = name.removeprefix("tuning.").rpartition(".")
        parts = module.split(".")
        if module == "model.norm":
            found["norm.weight" if official else "transformer.ln_f.weight"] = gradient
        elif module == "lm_head":
            found[f"lm_head.adapter_{kind}"] = gradient
        elif parts[3] in NORMS:
            mine = NORMS[parts[3]][0 if official else 1]
            found[f"{'layers' if official else 'transformer.h'}.{parts[2]}.{mine}.weight"] = gradient
        elif official:
            if kind in ("bias", "lora_up") and parts[4] in (
                "q_proj",
                "k_proj",
            ):  # Meta's rows: a head's halves in turns
                gradient = gradient.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)
            where = {"self_attn": "attention", "mlp": "feed_forward"}[parts[3]]
            found[f"layers.{parts[2]}.{where}.{official_name(case, OFFICIAL[parts[4]], kind)}"] = gradient
        elif (place := f"{parts[3]}.{parts[4]}") in LITGPT:
            found[f"transformer.h.{parts[2]}.{LITGPT[place]}.adapter_{kind}"] = gradient
    return found if official else found | fused_gradients(case, handle, own)


def official_name(case: str, linear: str, kind: str) -> str:
    if kind.startswith("lora"):
        return f"lora_{linear}_l{1 if kind == 'lora_down' else 2}.weight"
    return f"{linear}.{kind}" if with_images(case) else f"{linear}_{kind}"


def fused_gradients(case: str, handle: zinit.Handle, own: dict) -> dict[str, torch.Tensor]:
    """Gradients of the fused projection's scale and bias, what reached them through wrong rows of prompts included."""
    if handle.tuning is None:
        return {}
    found, stored = {}, torch.load(adapter_path(case), weights_only=True)["model"]
    for index, site in enumerate(handle.state.sites.values()):
        per_group = site.num_heads // site.num_kv_heads
        scale, bias = (fused_vector(handle, site, kind) for kind in ("scale", "bias"))
        total = {kind: fused_vector(handle, site, kind, gradient=True) for kind in ("scale", "bias")}
        for group in range(site.num_kv_heads) if f"{site.name}.key" in own else ():
            row = group * (per_group + 2) + per_group
            for block, kind in ((row, "key"), (row + 1, "value")):
                reached = own[f"{site.name}.{kind}"][group]
                prompt = stored[f"transformer.h.{index}.attn.adapter_wte.weight"]
                total["scale"][block] += (reached * (prompt @ fused_blocks(site.module)[block].T + bias[block])).sum(0)
                total["bias"][block] += reached.sum(0) * scale[block]
        for kind, blocks in total.items():
            if case.endswith("legacy"):  # by group: its queries, its key, its value
                heads, groups = site.num_heads, site.num_kv_heads
                query, key, value = blocks.split([heads, groups, groups])
                blocks = torch.cat([query.view(groups, per_group, -1), key[:, None], value[:, None]], dim=1)
            fused = "attn.attn" if case.endswith("legacy") else "attn.qkv"
            found[f"transformer.h.{index}.{fused}.adapter_{kind}"] = blocks.detach().flatten()
    return found
