"""Any other transformers model: what discovery finds out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

import zinit
from tests.contract.cases import causal_lm, encoder, randomized, text_batch
from tests.contract.checks import shortened
from zinit.adapter.check import check_backbone
from zinit.backbones import BACKBONES, find_backbone
from zinit.backbones._discover import TRANSFORMERS

TOKENS = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))


def heads(x: Tensor, size: int = 8) -> Tensor:
    """(K, G * D) to (G, K, D)."""
    return x.unflatten(-1, (-1, size)).transpose(0, 1)


def of_gpt2(host: Any) -> tuple[Tensor, Tensor]:
    _, key, value = host.c_attn(TOKENS).split(32, dim=-1)
    return heads(key), heads(value)


def of_neox(host: Any) -> tuple[Tensor, Tensor]:
    _, key, value = host.query_key_value(TOKENS).view(5, 4, 3, 8).unbind(2)  # interleaved by head
    return key.transpose(0, 1), value.transpose(0, 1)


def of_normed_heads(host: Any) -> tuple[Tensor, Tensor]:
    return host.k_norm(heads(host.k_proj(TOKENS))), heads(host.v_proj(TOKENS))


def of_normed_width(host: Any) -> tuple[Tensor, Tensor]:
    return heads(host.k_norm(host.k_proj(TOKENS))), heads(host.v_proj(TOKENS))


def of_biased(host: Any) -> tuple[Tensor, Tensor]:
    return heads(host.k_proj(TOKENS)), heads(host.v_proj(TOKENS))


def of_fused_grouped(host: Any) -> tuple[Tensor, Tensor]:
    _, key, value = host.qkv_proj(TOKENS).split([32, 16, 16], dim=-1)
    return heads(key), heads(value)


def of_latent(host: Any) -> tuple[Tensor, Tensor]:
    low, rotated = host.kv_a_proj_with_mqa(TOKENS).split([8, 4], dim=-1)
    rest, value = host.kv_b_proj(host.kv_a_layernorm(low)).view(5, 4, 14).transpose(0, 1).split([8, 6], dim=-1)
    rotated = rotated[:, [0, 2, 1, 3]].expand(4, 5, 4)  # pairs side by side become halves, in queries alike
    return torch.cat([rest, rotated], dim=-1), value


def of_esm(host: Any) -> tuple[Tensor, Tensor]:
    return heads(host.key(TOKENS)), heads(host.value(TOKENS))


def of_codegen(host: Any) -> tuple[Tensor, Tensor]:
    _, value, key = host.qkv_proj(TOKENS).view(5, 4, 24).split(8, dim=-1)  # four shards, a head each
    return key.transpose(0, 1), value.transpose(0, 1)


LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 3}  # fmt: skip
HOSTS: dict[str, tuple[Any, Any]] = {
    "gpt2": (lambda: causal_lm("GPT2"), of_gpt2),
    "gpt-neox": (lambda: causal_lm("GPTNeoX"), of_neox),
    "qwen3": (lambda: causal_lm("Qwen3", head_dim=8), of_normed_heads),
    "olmo2": (lambda: causal_lm("Olmo2"), of_normed_width),
    "phi": (lambda: causal_lm("Phi"), of_biased),
    "phi3": (lambda: causal_lm("Phi3"), of_fused_grouped),
    "deepseek-v3": (lambda: causal_lm("DeepseekV3", **LATENT), of_latent),
    "gptj": (lambda: causal_lm("GPTJ", rotary_dim=4), of_biased),  # its rotation is (sines, cosines)
    "codegen": (lambda: causal_lm("CodeGen", rotary_dim=4), of_codegen),
    "esm": (lambda: encoder("Esm", position_embedding_type="rotary"), of_esm),
}


@pytest.mark.parametrize("name", HOSTS)
def test_keys_and_values_are_the_host_s_own(name: str) -> None:
    """Against the projection written out for that one family; keys normalised where the host does, not rotated."""
    build, expected = HOSTS[name]
    model = build()
    assert find_backbone(model) is TRANSFORMERS
    sites = TRANSFORMERS.sites(model)
    assert len(sites) == 3
    for site in sites:
        key, value = site.project_kv(site.module, TOKENS)
        want_key, want_value = expected(site.module)
        torch.testing.assert_close(key[0], want_key)
        torch.testing.assert_close(value[0], want_value)
        batch_key, batch_value = site.project_kv(site.module, torch.stack([TOKENS.flip(0), TOKENS]))
        torch.testing.assert_close(batch_key[1], want_key)
        torch.testing.assert_close(batch_value[0].flip(1), want_value)


@pytest.mark.parametrize("name", ["gpt-neox", "qwen3", "deepseek-v3", "gptj"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch.compiler.reset()
    model = shortened(HOSTS[name][0]())
    zinit.attach(model, zinit.PrefixConfig(length=5, gate_init=0.7), seed=0)
    batch = text_batch("left")
    expected = model(**batch).logits
    # a mixture of experts breaks the graph by itself; dense layers do not
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


def test_named_backbones_and_users_come_before_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_backbone(causal_lm("Llama")).name == "llama"
    assert find_backbone(causal_lm("GPT2")).name == "transformers"
    monkeypatch.setattr(BACKBONES, "_where", dict(BACKBONES._where))
    zinit.register_backbone("zzz", "tests.backbones.test_discovery:ZZZ")
    assert find_backbone(causal_lm("GPT2")).name == "zzz"


class Zzz:
    name, default_task, demo_model = "zzz", "alpaca", ""

    def matches(self, model: nn.Module) -> bool:
        return True


ZZZ = Zzz()


def test_on_the_meta_device_the_facts_are_the_same() -> None:
    host = causal_lm("Qwen3", head_dim=8)
    real = TRANSFORMERS.sites(host)
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(host.config)  # pyright: ignore
    for site, expected in zip(TRANSFORMERS.sites(model), real, strict=True):
        assert site.shape() == expected.shape()
        assert next(site.module.parameters()).is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_is_accepted(dtype: torch.dtype) -> None:
    assert len(TRANSFORMERS.sites(causal_lm("Olmo2").to(dtype))) == 3


def with_attention(change: Any) -> nn.Module:
    """A LLaMA whose attention has another forward."""

    class Changed(LlamaAttention):
        forward = change(LlamaAttention.forward)

    model = causal_lm("Llama")
    for layer in model.model.layers:  # pyright: ignore
        layer.self_attn.__class__ = Changed
    return model


def shifts_tokens(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return forward(self, hidden_states + hidden_states.roll(1, 1), position_embeddings, **kwargs)

    return changed


def adds_positions(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        places = torch.arange(hidden_states.shape[1])[:, None]
        return forward(self, hidden_states + places, position_embeddings, **kwargs)

    return changed


def attends_twice(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        once, weights = forward(self, hidden_states, position_embeddings, **kwargs)
        return once - forward(self, hidden_states, position_embeddings, **kwargs)[0], weights

    return changed


def turns_keys(forward: Any) -> Any:
    """By a quarter, wherever a token stands."""

    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        cosines, sines = position_embeddings
        return forward(self, hidden_states, (0.6 * cosines - 0.8 * sines, 0.6 * sines + 0.8 * cosines), **kwargs)

    return changed


def wants_more(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, temperature: Tensor, position_embeddings: Any = None) -> Any:
        return forward(self, hidden_states * temperature, position_embeddings)

    return changed


def takes_more_values(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, value_embeds: Any = None) -> Any:
        return forward(self, hidden_states, position_embeddings)

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (takes_more_values, "takes value_embeds besides"),
        (shifts_tokens, "values depend on the neighbouring tokens"),
        (adds_positions, "values depend on the neighbouring tokens or on the position"),
        (attends_twice, "attends 2 times"),
        (turns_keys, "keys are turned"),
        (wants_more, "does not run on plain hidden states"),
    ],
)
def test_what_prompts_cannot_follow_is_refused(change: Any, reason: str) -> None:
    model = with_attention(change)
    before = [id(module.config) for module in model.modules() if hasattr(module, "config")]
    with pytest.raises(zinit.BackboneError, match=reason) as error:
        zinit.attach(model, backbone="transformers")
    assert "model.layers.0.self_attn (Changed)" in str(error.value)
    assert "register it" in str(error.value)
    assert [id(module.config) for module in model.modules() if hasattr(module, "config")] == before


def test_the_order_of_a_rotation_s_parts_is_found_out() -> None:
    """LLaMA's forward, called with (sines, cosines): neither name nor shape tells."""
    model = with_attention(reverses_rotation)
    plain = {site.name: site for site in TRANSFORMERS.sites(causal_lm("Llama"))}
    for site in TRANSFORMERS.sites(model):
        want = plain[site.name]
        for got, wanted in zip(site.project_kv(site.module, TOKENS), want.project_kv(want.module, TOKENS), strict=True):
            torch.testing.assert_close(got, wanted)


def reverses_rotation(forward: Any) -> Any:
    def changed(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return forward(self, hidden_states, position_embeddings[::-1], **kwargs)

    return changed


# --- keys and values that a layer does not make itself ------------------------------------------------------------


def sharing(kind: str) -> nn.Module:
    """Four layers; the last two take the keys and values of the first two, by kind of layer."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 2, "sliding_window": 4}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "max_position_embeddings": 64}
    inputs = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8, "pad_token_id": 0}
    if kind == "Gemma3n":
        layers |= {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4}
        layers["intermediate_size"] = [48] * 4
    config = getattr(transformers, f"{kind}TextConfig")(**sizes | heads | layers | inputs)
    config._attn_implementation = "sdpa"
    return randomized(getattr(transformers, f"{kind}TextModel")(config))


@pytest.mark.parametrize("kind", ["Gemma3n", "Gemma4"])
def test_layers_that_take_another_layer_s_keys_are_left_out(kind: str) -> None:
    model = sharing(kind)
    assert [site.name for site in TRANSFORMERS.sites(model)] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert check_backbone(model, backbone=None, **text_batch("none"), use_cache=False) == 2


def test_a_module_that_takes_all_its_keys_from_elsewhere_says_so() -> None:
    with pytest.raises(zinit.BackboneError, match="no keys and values of its own: an earlier layer's serve it"):
        zinit.attach(sharing("Gemma4").layers[2].self_attn)  # pyright: ignore


@pytest.mark.parametrize("first", [0, 1])
def test_projections_that_depend_on_the_calling_layer_are_refused(first: int) -> None:
    """Zamba2 lends one attention to several layers, each with a low-rank change of its own."""
    kinds = ["hybrid", "mamba", "hybrid"] if first == 0 else ["mamba", "hybrid", "hybrid"]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    mamba = {"num_mem_blocks": 1, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 8}
    shared = {"use_shared_attention_adapter": True, "adapter_rank": 4}
    kind: Any = transformers.Zamba2Config
    config = kind(**shape | mamba | shared, layers_block_type=kinds, vocab_size=61, pad_token_id=0, eos_token_id=None)
    with pytest.raises(zinit.BackboneError, match="projections depend on layer_idx"):
        zinit.attach(randomized(transformers.Zamba2Model(config)))


def test_an_option_that_goes_past_the_interface_is_refused() -> None:
    with pytest.raises(zinit.BackboneError, match="reorder_and_upcast_attn=True"):
        zinit.attach(causal_lm("GPT2", reorder_and_upcast_attn=True))


def test_no_attention_on_the_interface() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=2, vocab_size=61)
    with pytest.raises(zinit.BackboneError, match="no attention on transformers' attention interface"):
        zinit.attach(transformers.BloomModel(config))


def test_attention_that_may_look_anywhere_is_left_out() -> None:
    """SAM's mask decoder calls one class with its own states and with the image's."""
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
    from transformers.models.sam.modeling_sam import SamTwoWayTransformer

    config = SamMaskDecoderConfig(hidden_size=32, mlp_dim=48, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    with pytest.raises(zinit.BackboneError, match="key, value from elsewhere"):
        zinit.attach(randomized(SamTwoWayTransformer(config)))


def test_every_module_is_checked_not_only_the_first() -> None:
    model = with_attention(shifts_tokens)
    for layer in list(model.model.layers)[:-1]:  # pyright: ignore
        layer.self_attn.__class__ = LlamaAttention
    with pytest.raises(zinit.BackboneError, match=r"model\.layers\.2\.self_attn"):
        zinit.attach(model, backbone="transformers")
