"""What an adapted attention module sees of its config: the host's answers, but for the look-up of its function."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention, MiniMaxM3VLTextModel
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.utils.generic import is_flash_attention_requested

import zinit
from tests.contract.cases import causal_lm, randomized, text_batch
from zinit.adapter.check import check_backbone
from zinit.backbones._view import Lookup, asks_for_implementation


def sparse(**changes: Any) -> nn.Module:
    """A MiniMax-M3 whose attention makes masks of its own: each query sees one block of two keys and its neighbour."""
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rotary_dim": 8,
        "index_head_dim": 8,
    }
    blocks: dict[str, Any] = {"index_block_size": 2, "index_topk_blocks": 1, "layer_types": ["minimax_m3_sparse"] * 2}
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "mlp_layer_types": ["dense"] * 2}
    tokens = {"dense_intermediate_size": 48, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}
    config = MiniMaxM3VLTextConfig(**shape | heads | blocks | experts | tokens | changes)
    config._attn_implementation = "sdpa"
    return randomized(MiniMaxM3VLTextModel(config))


def hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**text_batch("none"), use_cache=False).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_module_that_makes_its_own_mask_still_makes_it(implementation: str) -> None:
    model: Any = sparse()
    model.set_attn_implementation(implementation)
    base = hidden(model)
    dense: Any = sparse(layer_types=["full_attention"] * 2)
    dense.set_attn_implementation(implementation)
    assert not torch.allclose(hidden(dense), base, atol=1e-2), "the mask must matter"
    handle = zinit.attach(model, zinit.PrefixConfig(length=3))
    assert torch.equal(hidden(model), base)
    for prefix in handle.prefixes.values():
        nn.init.constant_(prefix.gate, 0.7)
    opened = hidden(model)
    assert not torch.equal(opened, base)
    for name, twin in {"copied": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model))}.items():
        assert torch.equal(hidden(twin), opened), name
    handle.detach()
    assert torch.equal(hidden(model), base)


def test_checked_like_every_backbone() -> None:
    assert check_backbone(sparse(), backbone=None, **text_batch("none"), use_cache=False) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
def test_whatever_a_module_asks_is_the_host_s_answer(implementation: str) -> None:
    model: Any = sparse()
    zinit.attach(model, zinit.PrefixConfig(length=3))
    model.config._attn_implementation = implementation
    seen = model.layers[0].self_attn.config
    assert seen._attn_implementation == implementation
    assert seen.hidden_size == model.config.hidden_size
    assert is_flash_attention_requested(seen) == is_flash_attention_requested(model.config)


def test_a_pickled_model_finds_its_function_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file has transformers' own registry, and nothing is registered."""
    model = sparse()
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7))
    opened, written = hidden(model), pickle.dumps(model)
    file: Any = sys.modules[MiniMaxM3VLAttention.__module__]
    assert isinstance(file.ALL_ATTENTION_FUNCTIONS, Lookup)
    handle.detach()
    monkeypatch.setattr(file, "ALL_ATTENTION_FUNCTIONS", file.ALL_ATTENTION_FUNCTIONS.registry)
    assert torch.equal(hidden(pickle.loads(written)), opened)

    from transformers.modeling_utils import AttentionInterface

    llama = causal_lm("Llama")
    zinit.attach(llama, zinit.PrefixConfig(length=3, gate_init=0.7))
    opened, written = llama(**text_batch("none")).logits, pickle.dumps(llama)
    monkeypatch.delitem(AttentionInterface._global_mapping, "zinit")
    assert torch.equal(pickle.loads(written)(**text_batch("none")).logits, opened)


def test_other_modules_of_the_file_are_as_before() -> None:
    model, other = sparse(), sparse()
    base = hidden(other)
    handle = zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7))
    assert torch.equal(hidden(other), base)
    handle.detach()
    assert torch.equal(hidden(model), base)


def test_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    model: Any = causal_lm("GPT2")
    zinit.attach(model, zinit.PrefixConfig(length=5, gate_init=0.7), seed=0)
    assert asks_for_implementation(GPT2Attention)
    batch = text_batch("left")
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_who_asks() -> None:
    assert asks_for_implementation(MiniMaxM3VLAttention)
    assert asks_for_implementation(VisionAttention)  # hands its config to is_flash_attention_requested
    assert not asks_for_implementation(LlamaAttention)
    assert not asks_for_implementation(MistralAttention)  # asks it for the window
    assert asks_for_implementation(type("WithoutSource", (LlamaAttention,), {"__module__": "nowhere"}))


class Sees:
    """An attention function that notes what it is given for a module."""

    def __init__(self) -> None:
        self.names: list[Any] = []

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        self.names.append((module.config._attn_implementation, module.layer_idx))
        return query.transpose(1, 2), None


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/other"])
def test_other_attention_functions_see_the_model_s_own_config(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from transformers.modeling_utils import AttentionInterface

    sees = Sees()
    monkeypatch.setitem(AttentionInterface._global_mapping, name, sees)
    model: Any = causal_lm("Llama")
    zinit.attach(model, zinit.PrefixConfig(length=3, gate_init=0.7, layers=2))
    model.config._attn_implementation_internal = name
    model.model.layers[2].self_attn(torch.randn(1, 4, 32), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8)), None)
    assert sees.names == [(name, 2)]
