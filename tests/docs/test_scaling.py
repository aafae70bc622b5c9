"""The figures of docs/scaling.md: made by its script, and its script's counts those of real modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zinit
from scripts.make_scaling import DOCUMENT, SHAPES, Shape, render
from zinit.models.loading import load_causal_lm

PAPER = {"7B": 1_229_760, "13B": 1_947_120, "65B": 6_394_752}


def llama(shape: Shape) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=32_000,
        )
    )


def test_the_document_is_what_its_script_writes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert render(text) == text, "run: python -m scripts.make_scaling"
    assert "4,919,040 bytes" in text


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_counts_are_those_of_the_modules(shape: Shape) -> None:
    with torch.device("meta"):
        model = llama(shape)
    assert sum(p.numel() for p in model.model.layers.parameters()) == shape.blocks
    assert sum(p.numel() for p in model.parameters()) == shape.blocks + shape.outside
    handle = zinit.attach(model, zinit.PrefixConfig(length=10, layers=shape.adapted))
    assert handle.num_trainable == shape.adapter == PAPER[shape.name]
    assert {parameter.element_size() for parameter in handle.parameters()} == {4}


def saved_bytes(shape: Shape, tokens: int) -> int:
    """What autograd keeps of the activations between the forward and the backward pass of the layers."""
    model = llama(shape)
    model.bfloat16()
    zinit.attach(model, zinit.PrefixConfig(length=10, layers=shape.adapted), seed=0)
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tokens in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        total = sum(kept.values())
    assert output.requires_grad
    return total


def test_bytes_per_token_and_layer_are_those_that_autograd_keeps() -> None:
    tokens, few, many = 96, Shape("", 128, 344, 4, 4), Shape("", 128, 344, 8, 4)
    found = (saved_bytes(many, tokens) - saved_bytes(few, tokens)) / (4 * tokens)
    assert found == pytest.approx(few.per_token_and_layer, rel=0.05)


def test_layers_below_the_first_adapted_one_keep_nothing() -> None:
    """All that is kept is the adapted layers' share: half a layer's is too much for the two below them."""
    tokens = 96
    shape = Shape("", 128, 344, 4, 4)
    rest = saved_bytes(shape, tokens) - tokens * shape.activations
    assert abs(rest) < tokens * shape.per_token_and_layer / 2


def bytes_of(model: torch.nn.Module) -> int:
    """Of all parameters, with what bitsandbytes keeps beside the quantised ones."""
    total = 0
    for parameter in model.parameters():
        extra = [getattr(parameter, "SCB", None)]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            extra = [state.absmax, state.state2.absmax]
        tensors = [parameter, *(tensor for tensor in extra if tensor is not None)]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.mark.parametrize(("quantize", "bits"), [(None, 16), ("bnb-8bit", 8), ("bnb-4bit", 4)])
def test_bytes_of_quantised_weights_are_those_of_the_modules(quantize: Any, bits: int, tmp_path: Path) -> None:
    shape = Shape("", 256, 512, 3, 4)
    llama(shape).save_pretrained(tmp_path)
    model, _ = load_causal_lm(tmp_path, dtype=torch.bfloat16, quantize=quantize, tokenizer=False)
    assert bytes_of(model) == pytest.approx(shape.weights(bits), rel=1e-4)
