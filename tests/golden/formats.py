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


def tuned_tensors(linears: dict[str, tuple[int, int]], bias: str, scale: str | None) -> dict[str, Tensor]:
    """Biases, and scales of the output or the input, of linear layers {name with {}: (in, out)} of every layer."""
    made = {}
    for layer in range(N):
        for name, (into, out) in linears.items():
            made[bias.format(name.format(layer))] = torch.randn(out)
            if scale is not None:  # the official one is of the input
                made[scale.format(name.format(layer))] = torch.rand(into if scale == "{}_scale" else out)
    return made


MLP = 48
META = {f"layers.{{}}.attention.w{name}": (C, C) for name in "qkvo"} | {
    "layers.{}.feed_forward.w1": (C, MLP), "layers.{}.feed_forward.w3": (C, MLP), "layers.{}.feed_forward.w2": (MLP, C),
}  # fmt: skip


def norms(*names: str) -> dict[str, Tensor]:
    return {name.format(layer): torch.rand(C) for layer in range(N) for name in names}


def chat_tensors() -> dict[str, Tensor]:
    own = norms("layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight") | {"norm.weight": torch.rand(C)}
    return official_tensors() | own | tuned_tensors(META, "{}_bias", "{}_scale")


def multimodal_tensors(width: int = 8, features: int = 6) -> dict[str, Tensor]:
    """V2 with images, LoRA and two heads a block."""
    biased = {name: sizes for name, sizes in META.items() if not name.endswith(("wk", "wv"))}
    language = official_tensors() | tuned_tensors(biased, "{}.bias", None) | {"norm.weight": torch.rand(C)}
    prompts = {"adapter_query.weight": language.pop("adapter_query.weight")}
    language |= norms("layers.{}.attention_norm.weight", "layers.{}.ffn_norm.weight")
    for name, (into, out) in META.items():
        for layer in range(N):
            above, _, own = name.format(layer).rpartition(".")
            language |= {
                f"{above}.lora_{own}_l1.weight": torch.randn(2, into),
                f"{above}.lora_{own}_l2.weight": torch.randn(out, 2),
            }
    language |= {f"layers.{layer}.attention.new_gate": torch.ones(1, 1, 1, 1) for layer in range(N)}
    made = prompts | {"visual_query.weight": torch.randn(K, width)}
    inside = {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.fc1": (width, 4 * width),
              "mlp.fc2": (4 * width, width)}  # fmt: skip
    outside = {"clip_proj": (features, width), "visual_proj": (width, C)}
    for name, (into, out) in ({f"visual_blocks.0.{name}": sizes for name, sizes in inside.items()} | outside).items():
        made |= {f"{name}.weight": torch.randn(out, into), f"{name}.bias": torch.randn(out)}
    normed = dict.fromkeys(("visual_blocks.0.norm1", "visual_blocks.0.norm2", "clip_proj_norm"), width)
    for name, size in {**normed, "visual_proj_norm": C}.items():
        made |= {f"{name}.weight": torch.rand(size), f"{name}.bias": torch.rand(size)}
    return made | {f"llama.{name}": tensor for name, tensor in language.items()}


def imagebind_tensors(legacy: bool = False, tuned: bool = True, features: int = 6) -> dict[str, Tensor]:
    """ImageBind-LLM: one prompt in every layer, three bind blocks; fine-tuned, with LoRA, or pretrained only."""
    made = {"prefix_query.weight": torch.randn(N, C)}
    made |= {f"llama.layers.{layer}.attention.gate": torch.rand(1, H, 1, 1) for layer in range(N)}
    made |= {"image_bind_proj.weight": torch.randn(C, features), "image_bind_proj.bias": torch.randn(C)}
    for number in (1, 2, 3):
        made[f"image_bind_norm_{number}.weight"] = torch.rand(C)
        for name, shape in {"f1": (4 * C, C), "f2": (C, 4 * C), "f3": (4 * C, C)}.items():
            made[f"image_bind_{name}_{number}.weight"] = torch.randn(shape)
            made |= {f"image_bind_{name}_{number}.bias": torch.randn(shape[0])} if legacy else {}
        made |= {f"image_bind_norm_{number}.bias": torch.rand(C)} if legacy else {}
    language = multimodal_tensors() if tuned else {}
    kept = ("_bias", ".bias", "norm.weight", "_l1.weight", "_l2.weight")
    return made | {name: x for name, x in language.items() if name.startswith("llama.") and name.endswith(kept)}


def litgpt_v2_tensors(fused: str = "attn.qkv") -> dict[str, Tensor]:
    linears = {f"transformer.h.{{}}.{name}": sizes for name, sizes in {
        fused: (C, 3 * C), "attn.proj": (C, C), "mlp.fc_1": (C, MLP), "mlp.fc_2": (C, MLP), "mlp.proj": (MLP, C),
    }.items()}  # fmt: skip
    head = {"lm_head.adapter_bias": torch.randn(40), "lm_head.adapter_scale": torch.rand(40)}
    own = norms("transformer.h.{}.norm_1.weight", "transformer.h.{}.norm_2.weight")
    own |= {"transformer.ln_f.weight": torch.rand(C)}
    return litgpt_tensors() | head | own | tuned_tensors(linears, "{}.adapter_bias", "{}.adapter_scale")


TENSORS = {  # of every format that is one pickled dictionary of tensors; and the options it is imported with
    "official-v1": (official_tensors, {}),
    "official-v2": (multimodal_tensors, {"heads": 2}),
    "official-v2-chat": (chat_tensors, {}),
    "imagebind-llm": (imagebind_tensors, {}),
    "litgpt": (litgpt_tensors, {}),
    "litgpt-legacy": (litgpt_tensors, {}),
    "litgpt-v2": (litgpt_v2_tensors, {}),
    "litgpt-v2-legacy": (lambda: litgpt_v2_tensors("attn.attn"), {}),
}
