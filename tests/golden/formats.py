"""Small models, and files in other implementations' formats for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import zinit

C, H, N, K, L = 32, 4, 4, 5, 3
SHAPE = {
    "hidden_size": C,
    "intermediate_size": 48,
    "num_hidden_layers": N,
    "num_attention_heads": H,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
IDS = torch.arange(1, 21).view(2, 10)


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **changes)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2)).eval()


def trained(model, gates: float = 0.5, **settings) -> zinit.Handle:
    """An adapter whose gates are open, all different where the settings allow it."""
    handle = zinit.attach(model, zinit.PrefixConfig(**{"length": K, "layers": L, **settings}), seed=2)
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if name.endswith(".gate"):
                parameter.uniform_(-gates, gates, generator=torch.Generator().manual_seed(len(name)))
                parameter.view(-1)[0] = gates
    return handle


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS).logits


def state(model) -> tuple:
    """All that attaching could change."""
    handle = getattr(model, "_zinit", None)
    return (
        [name for name, _ in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        sorted(vars(model)),
        handle and {name: slot.active for name, slot in handle.slots.items()},
    )


def official_tensors(**changes) -> dict[str, Tensor]:
    made = {"adapter_query.weight": torch.randn(L * K, C)}
    for layer in range(N):
        made[f"layers.{layer}.attention.gate"] = torch.rand(1, H, 1, 1) if layer >= N - L else torch.zeros(1, H, 1, 1)
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def official_file(folder: Path, **changes) -> Path:
    torch.save(official_tensors(**changes), folder / "adapter.pth")
    return folder / "adapter.pth"


def peft_folder(folder: Path, tensors: dict[str, Tensor] | None = None, legacy=False, **changes) -> Path:
    if tensors is None:
        tensors = {}
        for layer in range(N - L, N):
            module = f"base_model.model.model.layers.{layer}.self_attn"
            tensors |= {f"{module}.adaption_prompt": torch.randn(1, K, C), f"{module}.adaption_gate": torch.rand(1)}
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": K, "adapter_layers": L, "target_modules": "self_attn"}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    if legacy:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def litgpt_tensors(gate_shape=(1, 1, H, 1)) -> dict[str, Tensor]:
    made = {}
    for layer in range(N - L, N):
        made[f"transformer.h.{layer}.attn.adapter_wte.weight"] = torch.randn(K, C)
        made[f"transformer.h.{layer}.attn.gating_factor"] = torch.rand(gate_shape)
    return made


def litgpt_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"model": tensors}, folder / "lit_model.pth.adapter")
    return folder / "lit_model.pth.adapter"
