"""The stories260K model of ../shared/data, converted to transformers' format as its layout notes say."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from tests.shared import SHARED

SOURCE = SHARED / "data" / "weights" / "stories260K"


def save_stories(folder: Path) -> Path:
    """Writes config, weights and tokenizer."""
    raw = (SOURCE / "stories260K.bin").read_bytes()
    width, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", raw[:28])
    rest = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    head = width // heads

    def take(*shape: int) -> Tensor:
        nonlocal rest
        count = int(np.prod(shape))
        tensor, rest = rest[:count].view(*shape), rest[count:]
        return tensor

    def half_split(weight: Tensor, count: int) -> Tensor:  # from adjacent rotary pairs to halves
        return weight.view(count, head // 2, 2, width).transpose(1, 2).reshape(count * head, width)

    embedding = take(vocabulary, width)
    shapes = {"input_layernorm": (width,), "self_attn.q_proj": (width, width),
              "self_attn.k_proj": (kv_heads * head, width), "self_attn.v_proj": (kv_heads * head, width),
              "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,),
              "mlp.gate_proj": (hidden, width), "mlp.down_proj": (width, hidden),
              "mlp.up_proj": (hidden, width)}  # fmt: skip
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    for name, shape in shapes.items():
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = half_split(weight, heads if name.endswith("q_proj") else kv_heads)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    weights["model.norm.weight"] = take(width)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=context, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    shutil.copyfile(SOURCE / "tok512.model", folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder
